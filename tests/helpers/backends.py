"""The backends that tests run over, and the dtypes of each."""

from __future__ import annotations

import pytest
import torch

from softclip_kernels.backends import cpu

# Those of plain PyTorch, which compute in float64 too. Triton, in its interpreter, has tests of its own.
FLOAT64_BACKENDS = ("reference", "chunked")
CPU_LEVELS = [f"cpu {level}" for level in cpu.levels()] or [
    pytest.param("cpu", marks=pytest.mark.skip(reason="the CPU extension is not built"))
]


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """Without float64, in which every target is exact (test_float64_is_exact)."""
    return cpu.DTYPES if backend == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
