"""A test of the tests: every result that is wrong on purpose (mutants.py) is refused by the library's standard, for
every target, dtype and scale of the catalogue and every backend of this machine. Interpreted Triton kernels:
backends/interpreted_triton.py; on a GPU: backends/test_triton_gpu.py. With -s the table of refusals is printed.
"""

from __future__ import annotations

import pytest
import torch
from helpers import mutants
from helpers.backends import dtypes_of

from bench import problems
from softclip_kernels.testing import (
    ALL_TARGETS,
    InsensitiveError,
    Result,
    Standard,
    dense_row_losses,
    dense_target,
    matching_rows,
    operands,
    truth,
    unit_rows,
)

SIZE = (129, 129, 40)
WITHOUT = {
    "no positive's term": {"groups", "groups_smoothing", "dense", "dense_both"}
    | {name for name in ALL_TARGETS if name.startswith(("teacher", "blocks"))},
    "teachers weigh 1.01": {"hard", "smoothing", "dense", "dense_both"}
    | {name for name in ALL_TARGETS if name.startswith(("labels", "groups", "two_indices"))},
}


@pytest.mark.parametrize("name", ALL_TARGETS)
def test_every_mutant_is_refused(name, backend):
    target = ALL_TARGETS[name](*SIZE[:2])
    found = {
        (dtype, scale): mutants.refusals(*operands(*SIZE, dtype=dtype, scale=scale), target, backend)
        for dtype in dtypes_of(backend)
        for scale in mutants.SCALES
    }
    print(mutants.table(name, found))
    assert not [(case, mutant) for case, row in found.items() for mutant, is_ in row.items() if is_ == mutants.MISSED]
    # A positive's term exists where a row's target is one column, the teachers' weight where there are teachers.
    assert {mutant for row in found.values() for mutant, is_ in row.items() if is_ == mutants.NONE} == {
        mutant for mutant, targets in WITHOUT.items() if name in targets
    }


def test_what_carries_no_signal_is_not_compared():
    """Pairs that have converged at a scale of 100 leave gradients of 1e-20: the standard says so instead of passing."""
    x = unit_rows(65, 32, dtype=torch.float32)
    scale = torch.tensor(100.0)
    for y in (matching_rows(x, noise=0.1), x):
        with pytest.raises(InsensitiveError, match=r"loss: an error of .* would be allowed .*contested_rows"):
            Standard.of(x, y, scale)
        Standard.of(x, y, scale, signal=False).check(truth(x, y, scale))
    large = (300 * x).half()
    with pytest.raises(InsensitiveError, match=r"dense PyTorch overflows in torch\.float16"):
        Standard.of(large, -large, scale, signal=False)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_gradient_of_the_logits_in_16_bits_passes(dtype):
    """What the kernels return at best: dscale is a single number, and dense PyTorch's may be right by chance. Targets
    without a positive, whose entry the kernels keep in float32."""
    for name in WITHOUT["no positive's term"]:
        target = ALL_TARGETS[name](*SIZE[:2])
        x, y, scale = operands(*SIZE, dtype=dtype, scale=1.0)
        exact, (a, b, factor) = truth(x, y, scale, target), (one.double() for one in (x, y, scale))
        z, one = (factor * a @ b.T).requires_grad_(), torch.ones_like(factor)
        matrices = dense_target(target, a, b, factor)
        row_losses, column_losses = dense_row_losses(z, torch.eye(len(b), dtype=z.dtype), one, matrices)
        (g,) = torch.autograd.grad(0.5 * (row_losses.mean() + column_losses.mean()), z)
        standard = Standard.of(x, y, scale, target)
        for unit in 2.0**12 / g.abs().max() * torch.linspace(0.5, 1, 8):  # each rounds in a way of its own
            rounded = (unit * g).to(dtype).double() / unit
            dx, dy = (factor * rounded @ b).to(dtype), (factor * rounded.T @ a).to(dtype)
            standard.check(Result(exact.loss, dx, dy, (rounded * (a @ b.T)).sum()))


def test_nan_is_refused():
    x, y, scale = operands(*SIZE)
    exact = truth(x, y, scale)
    nan = torch.full_like(exact.dx, torch.nan)
    with pytest.raises(AssertionError, match="dx: error nan"):
        Standard.of(x, y, scale).check(Result(exact.loss, nan, exact.dy, exact.dscale))


@pytest.mark.parametrize("loss", problems.LOSSES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_benchmarks_refuse_them_as_well(loss, dtype, monkeypatch):
    """Before anything is timed: a contender without gradients, and one whose loss is off by a percent."""
    fused = problems.fused(problems.target(loss, 300, 64, dtype), "chunked")
    x, y, scale = (leaf.detach() for leaf in problems.operands(300, 64, dtype))
    right = Result.of(fused, x, y, scale)
    exact = Result.of(problems.dense(loss, 300, 64, torch.float32, rounded=dtype), x.float(), y.float(), scale)
    problems.check(loss, 64, dtype, backend="chunked", n=300)
    problems.check_equal({"dense": exact, "fused": right}, x, y, scale)

    def without_gradient(x, y, scale):
        return fused(x.detach(), y.detach(), scale) + 0 * (x.sum() + y.sum())

    for name, wrong in {"dx": without_gradient, "loss": lambda *leaves: 1.01 * fused(*leaves)}.items():
        monkeypatch.setattr(problems, "fused", lambda *_, wrong=wrong: wrong)
        with pytest.raises(AssertionError, match=name):
            problems.check(loss, 64, dtype, backend="chunked", n=300)
        with pytest.raises(AssertionError, match=f"mutant against dense: {name}"):
            problems.check_equal({"dense": exact, "mutant": Result.of(wrong, x, y, scale)}, x, y, scale)
