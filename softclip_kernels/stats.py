"""The statistics of a softmax loss: what the forward block operation returns, its gradient, and how parts of it merge.

Blocks of columns of one row (or of rows of one column) combine in any order: log-sum-exps by logaddexp, a mean weighted
by its own normalizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .problem import Problem

SCALARS = 8  # numbers that a pass may hand to the next, for each teacher


@dataclass(frozen=True)
class SoftmaxStatistics:
    """One direction's, of L rows or L columns, named views of one tensor.

    packed        (1 + 2K, L) accumulation dtype: lse, then for each teacher teacher_lse[k] and teacher_mean[k]
    lse           (L,) the logits' log-sum-exp
    teacher_lse   (K, L) the log-sum-exp of each teacher's logits, biases added
    teacher_mean  (K, L) the student's mean logit under each teacher's distribution
    """

    packed: Tensor

    @property
    def lse(self) -> Tensor:
        return self.packed[0]

    @property
    def teacher_lse(self) -> Tensor:
        return self.packed[1::2]

    @property
    def teacher_mean(self) -> Tensor:
        return self.packed[2::2]

    @staticmethod
    def empty(teachers: int, length: int, like: Tensor) -> SoftmaxStatistics:
        """The neutral element of `merge`: nothing seen yet. Dtype and device of `like`."""
        nothing = SoftmaxStatistics(like.new_zeros(1 + 2 * teachers, length))
        nothing.lse.fill_(-torch.inf)
        nothing.teacher_lse.fill_(-torch.inf)
        return nothing

    def part(self, positions: slice) -> SoftmaxStatistics:
        return SoftmaxStatistics(self.packed[:, positions])

    def merge(self, other: SoftmaxStatistics) -> SoftmaxStatistics:
        """The statistics of the union of two disjoint parts."""
        merged = SoftmaxStatistics(torch.empty_like(self.packed))
        a, b = self, other
        merged.lse.copy_(torch.logaddexp(a.lse, b.lse))
        merged.teacher_lse.copy_(torch.logaddexp(a.teacher_lse, b.teacher_lse))
        merged.teacher_mean.copy_(
            _weight(a.teacher_lse, b.teacher_lse) * a.teacher_mean
            + _weight(b.teacher_lse, a.teacher_lse) * b.teacher_mean
        )
        return merged


def _weight(part: Tensor, other: Tensor) -> Tensor:
    """The part's share `exp(part) / (exp(part) + exp(other))`, as a sigmoid: the two shares sum to exactly 1."""
    return torch.where(part == -torch.inf, 0.0, torch.sigmoid(part - other))


class Statistics(NamedTuple):
    """What the forward block operation returns, in the accumulation dtype.

    rows            over columns, for each row: the logits z_ij, each teacher's `t_ij + column_bias_j`
    columns         over rows, for each column: z_ij, each teacher's `t_ij + row_bias_i`
    positive_logit  (N,) the positive's logit as this block computed it, 0 where it is not in the block; (0,) without
    row_ranks       (N,) int64, how many logits exceed row_threshold; (0,) without thresholds
    column_ranks    (M,) int64
    scalars         (max(1, K), 8) numbers that the backend's own backward pass takes again; (0, 8) where there are none
    kept            of a shape of the backend's own, whatever else its own backward pass takes again, or None
    """

    rows: SoftmaxStatistics
    columns: SoftmaxStatistics
    positive_logit: Tensor
    row_ranks: Tensor
    column_ranks: Tensor
    scalars: Tensor
    kept: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """As operators return them, of shapes that do not depend on the backend: (1 + 2K, N), (1 + 2K, M), (N,), (N,),
        (M,), (max(1, K), 8). `of` takes them back."""
        rows, columns, positive_logit, *ranks, scalars, _ = self
        if len(scalars) == 0:
            scalars = scalars.new_zeros(max(1, len(rows.packed) // 2), SCALARS)
        row_ranks, column_ranks = (each if len(each) else each.new_empty(0) for each in ranks)  # no two the same
        return rows.packed, columns.packed, positive_logit, row_ranks, column_ranks, scalars

    @staticmethod
    def empty(problem: Problem) -> Statistics:
        """What has seen nothing of this problem yet: the neutral element of every part."""
        like = problem.x.new_empty(0, dtype=problem.accumulation_dtype)
        teachers, ranked = len(problem.teachers), problem.row_threshold is not None
        return Statistics(
            SoftmaxStatistics.empty(teachers, problem.rows, like),
            SoftmaxStatistics.empty(teachers, problem.columns, like),
            like.new_zeros(0 if problem.positive_column is None else problem.rows),
            like.new_zeros(problem.rows if ranked else 0, dtype=torch.int64),
            like.new_zeros(problem.columns if ranked else 0, dtype=torch.int64),
            like.new_empty(0, SCALARS),
        )

    @staticmethod
    def of(
        rows: Tensor,
        columns: Tensor,
        positive_logit: Tensor,
        row_ranks: Tensor | None = None,
        column_ranks: Tensor | None = None,
        scalars: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Statistics:
        """Without ranks where none are counted or a backward pass has no use for them, without scalars where none are
        known."""
        if row_ranks is None or column_ranks is None:
            row_ranks = column_ranks = rows.new_empty(0, dtype=torch.int64)
        if scalars is None:
            scalars = rows.new_empty(0, SCALARS)
        both = SoftmaxStatistics(rows), SoftmaxStatistics(columns)
        return Statistics(*both, positive_logit, row_ranks, column_ranks, scalars, kept)


class StatisticsGradient(NamedTuple):
    """The loss's gradient with respect to Statistics. Teachers' log-sum-exps and ranks are constants and have none.

    rows            (1 + K, N) with respect to rows.lse, then to each rows.teacher_mean[k]
    columns         (1 + K, M) the same for the columns
    positive_logit  (N,) or, without positives, (0,)

    Of any strides: one number for all is an expanded one.
    """

    rows: Tensor
    columns: Tensor
    positive_logit: Tensor

    @staticmethod
    def of(rows: Tensor, columns: Tensor, positive_logit: Tensor) -> StatisticsGradient:
        """From the gradients of Statistics.tensors(): (1 + 2K, N), (1 + 2K, M), (N,)."""
        return StatisticsGradient(rows[0::2], columns[0::2], positive_logit)

    def contiguous(self) -> StatisticsGradient:
        return StatisticsGradient(*(each.contiguous() for each in self))


@dataclass(frozen=True)
class Wanted:
    """What a backward pass is asked for.

    x, y, scale  whether their gradients are needed
    rounded      dx and dy in the dtypes of x and y; else in the accumulation dtype, so that blocks may be added before
                 anything is rounded
    """

    x: bool = True
    y: bool = True
    scale: bool = True
    rounded: bool = False

    @property
    def products(self) -> tuple[bool, bool]:
        """Which of the products G @ y and G.T @ x are made: z is linear in x, in y and in scale, so the scale's
        gradient follows from either."""
        return self.x or (self.scale and not self.y), self.y


class InputGradients(NamedTuple):
    """What a backward pass returns: dx (N, D), dy (M, D) and dscale (0-d), None where not wanted. dscale has the
    accumulation dtype."""

    x: Tensor | None
    y: Tensor | None
    scale: Tensor | None


class ColumnBlock(NamedTuple):
    """A visiting block of M columns, as a linear term meets it.

    y         (M, D)
    start     the global number of the first column
    operands  what the term's own `column_operands` are for these columns, (M, ...) each
    """

    y: Tensor
    start: int
    operands: Sequence[Tensor]


class LinearTerm(Protocol):
    """A target matrix E whose sums against z need no log-sum-exp, hence no kernel. A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def column_operands(self) -> tuple[Tensor, ...]:
        """What the term knows about this rank's columns, (M, ...) each."""

    def dots(self, x: Tensor, columns: ColumnBlock, scale: Tensor) -> tuple[Tensor, Tensor]:
        """`(E * z).sum(1)` (N,) and `(E * z).sum(0)` (M,) of the rows x (N, D) and a block of columns; differentiable,
        in the accumulation dtype."""


class LossParts(NamedTuple):
    """What a loss is a linear function of: Statistics, and each linear term's dots (N,) and (M,). Over ranks: of this
    rank's rows with all columns, and of its columns with all rows."""

    statistics: Statistics
    row_dots: tuple[Tensor, ...]
    column_dots: tuple[Tensor, ...]
