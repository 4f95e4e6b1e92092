"""One forward and backward pass, for tools that look at a whole process: python -m bench.gpu_tools.once LOSS DTYPE N D
DEVICE."""

from __future__ import annotations

import sys

import torch

from softclip_kernels.testing import Result

from ..problems import Case

if __name__ == "__main__":
    loss, dtype, n, d, device = sys.argv[1:]
    case = Case(loss, getattr(torch, dtype), int(n), int(d), device)
    result = Result.of(case.fused("triton"), *(leaf.detach() for leaf in case.operands()))
    print(f"loss {result.loss.item():.6g}")
