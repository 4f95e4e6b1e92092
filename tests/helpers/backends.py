"""The backends that tests run over, the dtypes of each, and what this machine must have for them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from softclip_kernels.backends import cpu

# What this machine may lack.
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed")
needs_cpu_kernels = pytest.mark.skipif(not cpu.levels(), reason=str(cpu.why_missing()))

# Those of plain PyTorch, which compute in float64 too. Triton, in its interpreter, has tests of its own.
FLOAT64_BACKENDS = ("reference", "chunked")
BACKENDS = (*FLOAT64_BACKENDS, *(["cpu"] if cpu.levels() else []))
CPU_LEVELS = [f"cpu {level}" for level in cpu.levels()] or [pytest.param("cpu", marks=needs_cpu_kernels)]


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """Without float64, in which every target is exact (test_float64_is_exact)."""
    return cpu.DTYPES if backend == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
