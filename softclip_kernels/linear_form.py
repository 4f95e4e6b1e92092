"""One direction's losses as a linear function of its statistics, and what that makes of a gradient.

Coefficients are constants: (L,) tensors of L rows or columns, or numbers, which cost no operator where they are 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .indexing import take_rows
from .problem import Problem
from .stats import SoftmaxStatistics, StatisticsGradient

Coefficient = Tensor | float


@overload
def times(a: Coefficient, b: Tensor) -> Tensor: ...
@overload
def times(a: Coefficient, b: Coefficient) -> Coefficient: ...
def times(a: Coefficient, b: Coefficient) -> Coefficient:
    """`a * b`; the other one itself where one is the number 1."""
    if not isinstance(a, Tensor) and a == 1:
        return b
    return a if not isinstance(b, Tensor) and b == 1 else a * b


def plus(a: Coefficient, b: Coefficient) -> Coefficient:
    """`a + b`; the other one itself where one is the number 0."""
    if not isinstance(a, Tensor) and a == 0:
        return b
    return a if not isinstance(b, Tensor) and b == 0 else a + b


@dataclass(frozen=True)
class LinearForm:
    """loss_i = weight_i * (mass_i * lse_i - sum_t dots[t]_i * dot_ti - sum_k means[k]_i * teacher_mean_ki)

    seen  (L,) bool: where it is False nothing is seen at all, the log-sum-exp is -inf, and the mass must be 0; None:
          something is seen everywhere
    """

    mass: Coefficient
    dots: tuple[Coefficient, ...]
    means: tuple[Coefficient, ...]
    weight: Coefficient = 1.0
    seen: Tensor | None = None

    def losses(self, statistics: SoftmaxStatistics, dots: Sequence[Tensor]) -> Tensor:
        """(L,), from the statistics and a dot (L,) for each of `dots`."""
        lse = statistics.lse if self.seen is None else torch.where(self.seen, statistics.lse, 0.0)
        loss = times(self.mass, lse)
        for coefficient, dot in zip(self.dots, dots, strict=True):
            loss = loss - times(coefficient, dot)
        for k, coefficient in enumerate(self.means):
            loss = loss - times(coefficient, statistics.teacher_mean[k])
        return times(self.weight, loss)

    def adjoint(self, share: float) -> tuple[list[Coefficient], list[Coefficient]]:
        """What the sum of the losses times `share` changes by with each row's (column's) log-sum-exp and each teacher's
        mean, and with minus each dot: (L,), or one number for all."""
        share_of_each = times(self.weight, share)
        means = [-times(each, share_of_each) for each in self.means]
        return [times(self.mass, share_of_each), *means], [times(each, share_of_each) for each in self.dots]


class LinearForms(NamedTuple):
    """Both directions', None for one that is not in the loss."""

    rows: LinearForm | None
    columns: LinearForm | None

    def kept(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], LinearForms]]:
        """Every tensor, for save_for_backward, and what makes the forms again of them, which holds none."""
        alike = self.rows is self.columns
        rows = _flat(self.rows)
        hollow = rows if alike else rows + _flat(self.columns)
        of_rows = len(rows)
        places = [place for place, each in enumerate(hollow) if isinstance(each, Tensor)]
        if not places:
            return [], lambda tensors: self
        kept = [hollow[place] for place in places]
        for place in places:
            hollow[place] = None
        dots = [None if form is None else len(form.dots) for form in self]

        def restored(tensors: Sequence[Tensor]) -> LinearForms:
            filled = list(hollow)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            rows = _of(filled[:of_rows], dots[0])
            return LinearForms(rows, rows if alike else _of(filled[of_rows:], dots[1]))

        return kept, restored


class ReducedGradient(NamedTuple):
    """The gradient of Statistics from that of a reduced loss, not multiplied out.

    forms      the losses as linear forms of the statistics, whose dots are the positives', where there are any
    shares     what a row's and what a column's loss count in the reduced loss; 0 of a direction that is not in it
    diagonal   whether row i's positive is column i, for all of them
    of_loss    the reduced loss's own gradient, 0-d
    """

    forms: LinearForms
    shares: tuple[float, float]
    diagonal: bool
    of_loss: Tensor

    def multiplied(self, problem: Problem) -> StatisticsGradient:
        """Where it is one number for all rows, it is expanded."""
        gradient = self.of_loss
        rows, of_row_dots = _adjoint(self.forms.rows, self.shares[0], len(problem.teachers))
        columns, of_column_dots = _adjoint(self.forms.columns, self.shares[1], len(problem.teachers))
        of_rows, of_columns = _spread(gradient, rows, problem.rows), _spread(gradient, columns, problem.columns)
        if problem.positive_column is None:
            return StatisticsGradient(of_rows, of_columns, gradient.new_empty(0))
        if not self.diagonal:
            column = problem.positive_column
            of_column_dots = [take_rows(each, column) if isinstance(each, Tensor) else each for each in of_column_dots]
        less = -sum([*of_row_dots, *of_column_dots])
        return StatisticsGradient(of_rows, of_columns, (gradient * less).expand(problem.rows))


def _adjoint(form: LinearForm | None, share: float, teachers: int) -> tuple[list[Coefficient], list[Coefficient]]:
    return ([0.0] * (1 + teachers), []) if form is None else form.adjoint(share)


def _spread(gradient: Tensor, coefficients: Sequence[Coefficient], length: int) -> Tensor:
    """Their products, (len(coefficients), length)."""
    if len(coefficients) == 1:
        return (gradient * coefficients[0]).expand(1, length)
    return torch.stack([(gradient * each).expand(length) for each in coefficients])


def _flat(form: LinearForm | None) -> list[Any]:
    return [] if form is None else [form.mass, form.weight, form.seen, *form.dots, *form.means]


def _of(flat: Sequence[Any], dots: int | None) -> LinearForm | None:
    if dots is None:
        return None
    mass, weight, seen, *others = flat
    return LinearForm(mass, tuple(others[:dots]), tuple(others[dots:]), weight, seen)
