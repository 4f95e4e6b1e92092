"""Results that are wrong on purpose, as a broken kernel would return them: the library's standard must refuse each.

`refusals(x, y, scale, target, backend)` makes every mutant of the backend's result and says which the standard refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from softclip_kernels import Target, backends, positives
from softclip_kernels.stats import InputGradients
from softclip_kernels.testing import DenseTarget, Result, Standard, dense_row_losses, dense_target

SCALES = (1.0, 14.3, 100.0, 300.0)
TILE = (slice(32, 64), slice(0, 32))  # of the smallest tile that a kernel computes, off the diagonal
REFUSED, MISSED, NONE = "refused", "MISSED", "–"  # none: the target has no positive, or no teacher


def _without_row(gradient: Tensor) -> Tensor:
    """The row of median size is lost."""
    wrong = gradient.clone()
    wrong[gradient.double().norm(dim=1).argsort()[len(gradient) // 2]] = 0
    return wrong


RESULT_MUTANTS: dict[str, Callable[[Result], Result]] = {
    "dx = dy = 0": lambda r: replace(r, dx=0 * r.dx, dy=0 * r.dy),
    "dx = 0": lambda r: replace(r, dx=0 * r.dx),
    "dy = 0": lambda r: replace(r, dy=0 * r.dy),
    "-dx": lambda r: replace(r, dx=-r.dx),
    "2 dx": lambda r: replace(r, dx=2 * r.dx),
    "1.05 dx": lambda r: replace(r, dx=1.05 * r.dx),
    "1.05 dy": lambda r: replace(r, dy=1.05 * r.dy),
    "dscale = 0": lambda r: replace(r, dscale=0 * r.dscale),
    "1.01 loss": lambda r: replace(r, loss=1.01 * r.loss),
    "a row of dx": lambda r: replace(r, dx=_without_row(r.dx)),
    "a row of dy": lambda r: replace(r, dy=_without_row(r.dy)),
}


def without_tile(result: Result, x: Tensor, y: Tensor, scale: Tensor, target: DenseTarget) -> Result:
    """The gradients lack what the pairs of TILE bring. `target` in float64."""
    x, y, scale = x.double(), y.double(), scale.double()
    z = (scale * x @ y.T).requires_grad_()
    one, columns = torch.ones_like(scale), torch.eye(len(y), dtype=z.dtype, device=z.device)
    row_losses, column_losses = dense_row_losses(z, columns, one, target)  # z times the unit matrix
    (g,) = torch.autograd.grad(0.5 * (row_losses.mean() + column_losses.mean()), z)
    tile = torch.zeros_like(g)
    tile[TILE] = scale * g[TILE]
    return replace(result, dx=(result.dx - tile @ y).to(result.dx), dy=(result.dy - tile.T @ x).to(result.dy))


class _TeachersWeigh:
    """A backend whose teachers have `weight` times their weight, in the loss and in the gradients alike."""

    def __init__(self, backend: backends.Backend, weight: float) -> None:
        self._backend, self._weight, self.used = backend, weight, False

    def forward(self, problem, keep=False):
        statistics = self._backend.forward(problem)
        self.used |= bool(problem.teachers)
        for direction in (statistics.rows, statistics.columns):
            direction.teacher_mean.mul_(self._weight)
        return statistics

    def backward(self, problem, statistics, gradient, wanted):
        weight = gradient.rows.new_full((len(gradient.rows), 1), self._weight)
        weight[0] = 1.0
        weighted = gradient._replace(rows=weight * gradient.rows, columns=weight * gradient.columns)
        return self._backend.backward(problem, statistics, weighted, wanted)


class _LacksPositives:
    """A backend that leaves the positives' entries out of its gradients of x and y."""

    def __init__(self, backend: backends.Backend) -> None:
        self._backend, self.used = backend, False

    def forward(self, problem, keep=False):
        return self._backend.forward(problem)

    def backward(self, problem, statistics, gradient, wanted):
        dx, dy, dscale = self._backend.backward(problem, statistics, gradient, wanted)
        if problem.positive_column is not None:
            self.used = True
            lacking = -problem.scale * positives.gradient(problem, statistics, gradient)
            positives.add_gradient(problem, lacking.to(dx.dtype), dx, dy)
        return InputGradients(dx, dy, dscale)


BACKEND_MUTANTS = {
    "no positive's term": _LacksPositives,
    "teachers weigh 1.01": lambda backend: _TeachersWeigh(backend, 1.01),
}
NAMES = (*RESULT_MUTANTS, "a tile", *BACKEND_MUTANTS)


def refusals(x: Tensor, y: Tensor, scale: Tensor, target: Target, backend: str) -> dict[str, str]:
    """What becomes of each mutant of `NAMES`: REFUSED, MISSED, or NONE where the target has nothing to mutate. The
    unmutated result passes, or AssertionError is raised; InsensitiveError where the problem proves nothing."""
    standard = Standard.of(x, y, scale, target)
    result = Result.of_loss(x, y, scale, target, backend=backend)
    standard.check(result)
    matrices = dense_target(target, x.double(), y.double(), scale.double())
    mutated: dict[str, Result | None] = {name: mutate(result) for name, mutate in RESULT_MUTANTS.items()}
    mutated["a tile"] = without_tile(result, x, y, scale, matrices)
    for name, broken in BACKEND_MUTANTS.items():
        wrapped = broken(backends.registered()[backend])
        with mock.patch.object(backends, "select", return_value=wrapped):
            wrong = Result.of_loss(x, y, scale, target, backend=backend)
        mutated[name] = wrong if wrapped.used else None
    return {name: _verdict(standard, one) for name, one in mutated.items()}


def _verdict(standard: Standard, mutant: Result | None) -> str:
    if mutant is None:
        return NONE
    try:
        standard.check(mutant)
    except AssertionError:
        return REFUSED
    return MISSED


def table(name: str, found: dict[tuple[torch.dtype, float], dict[str, str]]) -> str:
    """A line a mutant: at how many of the cases it was refused, and where it was not."""
    lines = [f"{name}: {len(found)} cases of dtype and scale"]
    for mutant in NAMES:
        verdicts = [row[mutant] for row in found.values()]
        missed = [case for case, row in found.items() if row[mutant] == MISSED]
        lines.append(
            f"  {mutant:22}{verdicts.count(REFUSED):3} refused, {verdicts.count(NONE)} without  {missed or ''}"
        )
    return "\n".join(lines)
