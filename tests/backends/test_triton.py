"""The Triton backend on a machine without a GPU: interpreted, refused, bounded in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import interpreter
from helpers.backends import needs_triton

from softclip_kernels import backends, softclip_loss
from softclip_kernels.problem import Problem
from softclip_kernels.testing import unit_rows

HERE = Path(__file__).parent


# Groups for several processors.
@needs_triton
@pytest.mark.parametrize("group", ("mutant or targets", "not mutant and not targets"))
def test_the_kernels_pass_their_tests_interpreted(group):
    """The tests are in interpreted_triton.py."""
    interpreter.assert_kernels_pass(HERE / "interpreted_triton.py", 20, "-k", group, "-m", "not long")


@needs_triton
@pytest.mark.long
def test_the_kernels_pass_their_long_tests_interpreted():
    interpreter.assert_kernels_pass(HERE / "interpreted_triton.py", 8, "-m", "long")


def test_without_a_gpu_it_says_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = unit_rows(4, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"not on a GPU|not installed"):
        softclip_loss(x, x, torch.tensor(1.0), backend="triton")
    assert backends.select("auto", Problem(x, x, torch.tensor(1.0))).name != "triton"


def test_without_triton_it_says_so(monkeypatch):
    from softclip_kernels.backends import triton

    monkeypatch.setattr(triton, "_installed", lambda: False)
    x = unit_rows(4, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        softclip_loss(x, x, torch.tensor(1.0), backend="triton")


def test_too_many_ranks_are_refused(monkeypatch):
    from softclip_kernels.backends import triton

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "MOST_RANKED", 4)
    x, threshold = unit_rows(4, 8, dtype=torch.float32), torch.zeros(4)
    problem = Problem(x, x, torch.tensor(1.0), row_threshold=threshold, column_threshold=threshold)
    expected = "ranks" if triton._installed() else "not installed"
    assert expected in (triton.TritonBackend().why_not(problem) or "")


@needs_triton
def test_gradient_sums_without_addition_in_place(monkeypatch):
    """Where torch cannot add a product of 16-bit matrices to an fp32 sum (the CPU, some versions), the product is made
    apart; where it can, the sum is the output."""
    from softclip_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "_in_place", {})
    assert not launch._adds_in_place(torch.bfloat16, torch.device("cpu"))
    a, b = (unit_rows(5, 5, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    expected = 1 + a.float() @ b.float()

    def mm(a, b, out_dtype):
        return a.to(out_dtype) @ b.to(out_dtype)

    def addmm(total, a, b, out_dtype, out):
        return out.copy_(total + mm(a, b, out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    total = torch.ones(5, 5)
    launch.add_product(total, a, b)
    torch.testing.assert_close(total, expected)
    launch._in_place.clear()
    monkeypatch.setattr(torch, "addmm", addmm)
    assert launch._adds_in_place(torch.bfloat16, torch.device("cpu"))
    total = torch.ones(5, 5)
    launch.add_product(total, a, b)
    torch.testing.assert_close(total, expected)


@needs_triton
@pytest.mark.parametrize("n", (100, 4096, 32768, 131072, 1 << 20))
@pytest.mark.parametrize("count", (1, 3, 6))
def test_scratch_is_bounded_whatever_the_batch(n, count):
    """Partial sums (forward) and G (backward) fit in the published scratch for every batch and tile shape."""
    from bench.aot.variants import ARCHITECTURES
    from softclip_kernels.backends.triton import launch
    from softclip_kernels.backends.triton.shapes import candidates

    for architecture in ARCHITECTURES:
        for mode in ("embeddings", "transposed"):
            for shape in candidates("forward", mode, True, 2, architecture):
                edge = launch.forward_edge(shape, count, mode == "transposed", n)
                slots = edge // shape.block_m + edge // shape.block_n
                assert edge > 0 and edge % shape.block_m == edge % shape.block_n == 0
                assert 4 * count * (1 + (mode == "transposed")) * slots * edge <= launch.SCRATCH
                assert edge < n + max(shape.block_m, shape.block_n)
    for itemsize in (2, 4):
        edge = launch.largest_edge(launch.SCRATCH / itemsize, 128, n)
        assert edge > 0 and edge * edge * itemsize <= launch.SCRATCH
