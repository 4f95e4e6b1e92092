"""Where the time of a pass goes, and which phase misses its share of the goal."""

from __future__ import annotations

import torch

from .. import Row, timing
from ..gpu_tools.breakdown import breakdown as by_kernel
from ..problems import Case
from .goals import phase_goals, phases_reached
from .steps import GEMMS, gemm_run


def breakdown(case: Case, gemm: int) -> Row:
    """A pass by kernels and phases (bench.gpu_tools), each phase beside what it may take at the rate of products of
    (gemm, gemm) matrices, timed right before."""
    run = gemm_run(case, gemm)
    seconds = timing.interleaved({"gemm": run}, 3, 1, 0.0, timing.device_seconds)["gemm"].median
    row: Row = by_kernel(case)
    rate = GEMMS * 2 * gemm**3 / seconds
    allowed = phase_goals(case, rate)
    torch.cuda.synchronize()
    return row | {
        "gemm TFLOP/s": rate / 1e12,
        "phase goals ms": allowed,
        "goals": phases_reached(row["phases"], allowed),
    }
