# mypy: disallow-untyped-defs=False
"""The sum of a vector, in float64 and in a fixed order, by one program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .call import Call

AT_ONCE = 1024  # entries that are added at once

ARGUMENTS = {"vector": "*fp32", "result": "*fp32", "length": "i32"}


@triton.jit(do_not_specialize=["length"])
def total_kernel(vector, result, length, BLOCK: tl.constexpr):
    """result (): the sum of vector (length,)."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(vector + index, mask=index < length, other=0.0).to(tl.float64)
    tl.store(result, tl.sum(total).to(tl.float32))


def total(vector: Tensor) -> Tensor:
    """Its sum, 0-d; vector (length,) fp32, contiguous."""
    result = vector.new_empty(())
    Call(total_kernel, {"vector": vector, "result": result, "length": len(vector), "BLOCK": AT_ONCE}, {})(1)
    return result
