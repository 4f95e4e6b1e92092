"""What a backend computes on: one block of logits, its teachers, and the statistics that come out of it.

Shapes, here and in every backend: N rows (images), M columns (texts), D the embedding width, E a teacher's
embedding width, K the number of teachers. `z = scale * x @ y.T` is the (N, M) block of logits that is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Source(IntEnum):
    """Where a teacher's logits t come from."""

    EMBEDDINGS = 0  # t = scale * x @ y.T, from the teacher's own embeddings
    LOGITS = 1  # t = scale * z, the student's own logits (scale None: 1, "tied")
    TRANSPOSED = 2  # t = scale * z.T, the student's own logits of the swapped pair; needs N == M


@dataclass(frozen=True)
class TeacherOperand:
    """One teacher. Its row distribution is `softmax_j(t_ij + column_bias_j)`, its column distribution
    `softmax_i(t_ij + row_bias_i)`; a bias of -inf excludes that column (row). Never differentiated.

    scale        0-d, accumulation dtype; None with LOGITS and TRANSPOSED: exactly 1
    x, y         (N, E) and (M, E), only with Source.EMBEDDINGS
    row_bias     (N,) accumulation dtype, or None: zero
    column_bias  (M,) accumulation dtype, or None: zero
    """

    source: Source
    scale: Tensor | None = None
    x: Tensor | None = None
    y: Tensor | None = None
    row_bias: Tensor | None = None
    column_bias: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything but the source, in the order that the constructor takes it back after the source."""
        return self.scale, self.x, self.y, self.row_bias, self.column_bias

    def block(self, rows: slice, columns: slice) -> TeacherOperand:
        return replace(
            self,
            x=_sliced(self.x, rows),
            y=_sliced(self.y, columns),
            row_bias=_sliced(self.row_bias, rows),
            column_bias=_sliced(self.column_bias, columns),
        )


@dataclass(frozen=True)
class Problem:
    """One block. Every optional operand that is None costs nothing.

    x, y              (N, D) and (M, D), same floating dtype, any strides
    scale             0-d, accumulation dtype
    positive_column   (N,) int64: the column of each row's positive. A value outside [0, M) means that the positive is
                      not in this block
    row_segment       (N,) int64 } a pair of unequal segments is excluded: from both softmaxes and from both
    column_segment    (M,) int64 } distributions of every teacher (both given or neither)
    row_threshold     (N,) } ranks count the logits above these: z_ij > row_threshold_i for row i and
    column_threshold  (M,) } z_ij > column_threshold_j for column j (both given or neither)
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    positive_column: Tensor | None = None
    row_segment: Tensor | None = None
    column_segment: Tensor | None = None
    teachers: tuple[TeacherOperand, ...] = ()
    row_threshold: Tensor | None = None
    column_threshold: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def columns(self) -> int:
        return self.y.shape[0]

    @property
    def accumulation_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.x.dtype)

    def positives_inside(self) -> tuple[Tensor, Tensor]:
        """Which rows (N,) have their positive in this block, and a column (N,) that is safe to index with for those
        that do not."""
        assert self.positive_column is not None
        inside = (self.positive_column >= 0) & (self.positive_column < self.columns)
        return inside, self.positive_column.clamp(0, self.columns - 1)

    def block(self, rows: slice, columns: slice) -> Problem:
        """The sub-problem of these rows and columns. A TRANSPOSED teacher keeps its source: whoever computes the
        block must supply the logits of the swapped block."""
        return replace(
            self,
            x=self.x[rows],
            y=self.y[columns],
            positive_column=None if self.positive_column is None else self.positive_column[rows] - columns.start,
            row_segment=_sliced(self.row_segment, rows),
            column_segment=_sliced(self.column_segment, columns),
            teachers=tuple(teacher.block(rows, columns) for teacher in self.teachers),
            row_threshold=_sliced(self.row_threshold, rows),
            column_threshold=_sliced(self.column_threshold, columns),
        )


def _sliced(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


class Statistics(NamedTuple):
    """What the forward block operation returns, in the accumulation dtype.

    rows           (1 + 2K, N): the logits' log-sum-exp over columns; then for each teacher k the log-sum-exp of its row
                   logits `t_ij + column_bias_j`, and `sum_j softmax_j(t_ij + column_bias_j) * z_ij`, the student's mean
                   logit under the teacher's row distribution
    columns        (1 + 2K, M): the same over rows
    positive_logit (N,) the positive's logit as this block computed it, 0 where it is not in the block; (0,) without
    row_ranks      (N,) int64, how many logits exceed row_threshold; (0,) without thresholds
    column_ranks   (M,) int64
    """

    rows: Tensor
    columns: Tensor
    positive_logit: Tensor
    row_ranks: Tensor
    column_ranks: Tensor


class LinearTerm(Protocol):
    """A target matrix E whose sums against z need no log-sum-exp, hence no kernel."""

    def column_operands(self) -> tuple[Tensor, ...]:
        """What the term knows about this rank's columns, (M, ...) each."""

    def dots(
        self, x: Tensor, y: Tensor, scale: Tensor, start: int, operands: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`(E * z).sum(1)` (N,) and `(E * z).sum(0)` (M,) of the rows x (N, D) and the columns y (M, D), which begin at
        the global column `start` and bring these column_operands; differentiable, in the accumulation dtype."""


class LossParts(NamedTuple):
    """What a loss is a linear function of: Statistics, and each linear term's dots (N,) and (M,). Over ranks: of this
    rank's rows with all columns, and of its columns with all rows."""

    statistics: Statistics
    row_dots: tuple[Tensor, ...]
    column_dots: tuple[Tensor, ...]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 accumulates in float64; float32, float16 and bfloat16 in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
