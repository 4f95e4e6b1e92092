"""One direction's losses as a linear function of its statistics, and what that makes of a gradient.

Coefficients are constants: (L,) tensors of L rows or columns, or numbers, which cost no operator where they are 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .stats import SoftmaxStatistics

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
        flat = [_flat(form) for form in self]
        hollow = [[Tensor if isinstance(each, Tensor) else each for each in one] for one in flat]
        dots = [0 if form is None else len(form.dots) for form in self]

        def restored(tensors: Sequence[Tensor]) -> LinearForms:
            remaining = iter(tensors)
            filled = [[next(remaining) if each is Tensor else each for each in one] for one in hollow]
            return LinearForms(*(_of(one, count) for one, count in zip(filled, dots, strict=True)))

        return [each for one in flat for each in one if isinstance(each, Tensor)], restored


def _flat(form: LinearForm | None) -> list[Any]:
    return [] if form is None else [form.mass, form.weight, form.seen, *form.dots, *form.means]


def _of(flat: Sequence[Any], dots: int) -> LinearForm | None:
    if not flat:
        return None
    mass, weight, seen, *others = flat
    return LinearForm(mass, tuple(others[:dots]), tuple(others[dots:]), weight, seen)
