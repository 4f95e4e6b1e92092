"""Every backend beside dense PyTorch, by pytest-benchmark: a quick comparison that pytest can save and compare.

    pytest bench/test_backends.py --benchmark-group-by=param:loss --benchmark-columns=median,iqr,rounds

`python -m bench cpu` and `gpu` measure more, interleaved. As a test it checks correctness and times nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import problems, timing
from softclip_kernels.backends import cpu

pytest.importorskip("pytest_benchmark")

N, D = 2048, 256
CONTENDERS = ("dense", "chunked", *(["cpu"] if cpu.levels() else []))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("loss", problems.LOSSES)
def test_forward_and_backward(loss: str, contender: str, benchmark: Any) -> None:
    dtype = torch.float32
    if contender == "dense":
        function = problems.dense(loss, N, D, dtype)
    else:
        problems.check(loss, D, dtype, backend=contender, n=300)
        function = problems.fused(problems.target(loss, N, D, dtype), contender)
    benchmark(timing.forward_backward(function, *problems.operands(N, D, dtype)))
