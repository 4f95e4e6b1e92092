# mypy: disallow-untyped-defs=False
"""A multiprocessor's own counters."""

from __future__ import annotations

import triton
import triton.language as tl

SLOTS = 1024  # more than the numbers of any GPU's multiprocessors, of which some are left out


@triton.jit
def counters_kernel(out, SLOTS: tl.constexpr):
    """Cycles and nanoseconds to (SLOTS, 2), at the number of the multiprocessor that runs this program. A launch of one
    program for each reaches nearly all."""
    number = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    cycles = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    time = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    slot = out + 2 * (number % SLOTS)
    tl.store(slot, cycles)
    tl.store(slot + 1, time)
