"""Every kind of grad_output reaches every operand: against dense autograd in float64, by CPU backend and dtype."""

from __future__ import annotations

import pytest
import torch

from softclip_kernels import softclip_loss
from softclip_kernels.backends import cpu
from softclip_kernels.testing import ALL_TARGETS, dense_row_losses, dense_target, unit_rows

N, D = 241, 16  # two blocks of every CPU level, six of the chunked backend in these tests
NAMES = ("dx", "dy", "dscale")
# No teacher, one from the same pass, one with own embeddings, and a hard term whose gradient is added to the kernel's.
TARGETS = ("hard", "psd", "psd_external", "groups_smoothing")
CASES = [("chunked", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [("cpu", dtype) for dtype in cpu.DTYPES] if cpu.levels() else []
# Of the largest exact entry: a gradient's rounding to its dtype, or that of a 16-bit G.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def some(seed):
    """(N,) of both signs, of the size of a mean's gradient."""
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) / N


KINDS = {
    "a factor": (torch.full((N,), 3.7 / N), torch.full((N,), 3.7 / N)),
    "expanded": (torch.tensor(0.3 / N).expand(N), torch.tensor(-0.2 / N).expand(N)),
    "one for each row": (some(1), some(2)),
    "strided": (torch.stack([some(1), some(3)], 1)[:, 0], torch.stack([some(3), some(2)], 1)[:, 1]),
    "rows alone": (some(1), torch.zeros(()).expand(N)),
    "columns alone": (torch.zeros(N), some(2)),
}


@pytest.fixture(params=TARGETS)
def target(request):
    return ALL_TARGETS[request.param](N, N)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} {str(case[1]).removeprefix('torch.')}")
def case(request, monkeypatch):
    """A backend and a dtype; the one of C++ kernels with two threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu, "MULTIPLY_ADDS_PER_THREAD", dict.fromkeys(cpu.THREADS, 1))
    return request.param


def leaves(dtype):
    """Unlike pairs, so that no gradient vanishes."""
    x, y = (unit_rows(N, D, seed=seed, dtype=dtype) for seed in (0, 1))
    return [x.requires_grad_(), y.requires_grad_(), torch.tensor(10.0, requires_grad=True)]


def fused(operands, target, backend, outputs, reduction="none"):
    losses = softclip_loss(*operands, target, reduction=reduction, backend=backend)
    return torch.autograd.grad(losses, operands, outputs)


def exact(operands, target, outputs):
    wide = [operand.detach().double().requires_grad_() for operand in operands]
    losses = dense_row_losses(*wide, dense_target(target, *wide))
    return torch.autograd.grad(losses, wide, [output.double() for output in outputs])


def assert_close(got, expected, dtype):
    for name, one, truth in zip(NAMES, got, expected, strict=True):
        assert truth.abs().max() > 1e-5, "there is something to get wrong"
        error = (one.double() - truth).abs().max() / truth.abs().max()
        assert error <= BOUND[dtype], f"{name}: {error:.1e} of the largest entry"


@pytest.mark.parametrize("kind", KINDS)
def test_against_dense_autograd(kind, case, target):
    backend, dtype = case
    operands, outputs = leaves(dtype), KINDS[kind]
    assert_close(fused(operands, target, backend, outputs), exact(operands, target, outputs), dtype)


@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_a_factor_of_a_reduced_loss(reduction, case, target):
    backend, dtype = case
    operands, factor = leaves(dtype), torch.tensor(-3.7 if reduction == "mean" else -3.7 / N)
    share = torch.full((N,), 0.5 * factor.item() / (N if reduction == "mean" else 1))
    got = fused(operands, target, backend, factor, reduction)
    assert_close(got, exact(operands, target, (share, share)), dtype)


def test_zero_is_exactly_zero(case, target):
    backend, dtype = case
    operands = leaves(dtype)
    for zero in (torch.zeros(N), torch.zeros(()).expand(N)):
        assert not any(gradient.any() for gradient in fused(operands, target, backend, (zero, zero)))
    assert not any(gradient.any() for gradient in fused(operands, target, backend, torch.zeros(()), "mean"))


def test_infinity_is_seen_everywhere(case, target):
    """A loss that overflowed in its scaling leaves no gradient that looks usable."""
    backend, dtype = case
    operands = leaves(dtype)
    assert not any(one.isfinite().any() for one in fused(operands, target, backend, torch.tensor(torch.inf), "mean"))


@pytest.mark.parametrize("name", ("hard", "psd_external"))
def test_one_infinite_row_spoils_no_other(name, case):
    """An infinite gradient of row 7's loss: in dx of that row alone, the others as in dense autograd; in all of dy."""
    backend, dtype = case
    operands, target, rows = leaves(dtype), ALL_TARGETS[name](N, N), some(1)
    rows[7] = torch.inf
    dx, dy, dscale = fused(operands, target, backend, (rows, some(2)))
    assert not dx[7].isfinite().any() and not dy.isfinite().any() and not dscale.isfinite()
    others = torch.arange(N) != 7
    expected = exact(operands, target, (rows.masked_fill(~others, 0.0), some(2)))[0]
    error = (dx.double() - expected)[others].abs().max() / expected[others].abs().max()
    assert error <= BOUND[dtype]
