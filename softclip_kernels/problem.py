"""What a backend computes on: one block of logits and its teachers.

Shapes, here and in every backend: N rows (images), M columns (texts), D the embedding width, E a teacher's
embedding width, K the number of teachers. `z = scale * x @ y.T` is the (N, M) block of logits that is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

# What a field of a problem runs along. Whatever slices, sends or packs a problem goes by this, and names no field.
ROWS, COLUMNS = {"along": "rows"}, {"along": "columns"}


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
    x: Tensor | None = field(default=None, metadata=ROWS)
    y: Tensor | None = field(default=None, metadata=COLUMNS)
    row_bias: Tensor | None = field(default=None, metadata=ROWS)
    column_bias: Tensor | None = field(default=None, metadata=COLUMNS)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything but the source, in the order that the constructor takes it back after the source."""
        return tuple(getattr(self, name) for name in TEACHER_TENSORS)

    def block(self, rows: slice, columns: slice) -> TeacherOperand:
        return replace(self, **_sliced(self, rows, columns))


@dataclass(frozen=True)
class Problem:
    """One block. Every optional operand that is None costs nothing.

    x, y              (N, D) and (M, D), same floating dtype, any strides
    scale             0-d, accumulation dtype
    positive_column   (N,) int64: the column of each row's positive. A value outside [0, M) means that the positive is
                      not in this block
    positive_row      (M,) int64: the row whose positive each column is, or None: not known, and rows may share one. A
                      value outside [0, N) means that no row of this block has this column as its positive
    row_segment       (N,) int64 } a pair of unequal segments is excluded: from both softmaxes and from both
    column_segment    (M,) int64 } distributions of every teacher (both given or neither)
    row_threshold     (N,) } ranks count the logits above these: z_ij > row_threshold_i for row i and
    column_threshold  (M,) } z_ij > column_threshold_j for column j (both given or neither)
    """

    x: Tensor = field(metadata=ROWS)
    y: Tensor = field(metadata=COLUMNS)
    scale: Tensor
    positive_column: Tensor | None = field(default=None, metadata=ROWS)
    row_segment: Tensor | None = field(default=None, metadata=ROWS)
    column_segment: Tensor | None = field(default=None, metadata=COLUMNS)
    teachers: tuple[TeacherOperand, ...] = ()
    row_threshold: Tensor | None = field(default=None, metadata=ROWS)
    column_threshold: Tensor | None = field(default=None, metadata=COLUMNS)
    positive_row: Tensor | None = field(default=None, metadata=COLUMNS)

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def columns(self) -> int:
        return self.y.shape[0]

    @property
    def is_empty(self) -> bool:
        return 0 in (self.rows, self.columns)

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
        """The sub-problem of these rows and columns. A TRANSPOSED teacher keeps its source: whoever computes the block
        must supply the logits of the swapped block."""
        teachers = tuple(teacher.block(rows, columns) for teacher in self.teachers)
        block = replace(self, **_sliced(self, rows, columns), teachers=teachers)
        return block.counted_from(columns.start, rows.start)

    def counted_from(self, column: int, row: int = 0) -> Problem:
        """The same where this block's first column and row are the given ones of those that the positives count."""
        moved = {"positive_column": column, "positive_row": row}
        counted = {name: getattr(self, name) - start for name, start in moved.items() if start and _given(self, name)}
        return replace(self, **counted) if counted else self

    def zero_gradients(self, needed: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """For a backend's sums: zeros of the shapes of x and y in the accumulation dtype, None where not needed."""
        gx, gy = (
            operand.new_zeros(operand.shape, dtype=self.accumulation_dtype) if needs else None
            for operand, needs in zip((self.x, self.y), needed, strict=True)
        )
        return gx, gy

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors: the problem's own, then each teacher's. `of` takes them back."""
        own = [getattr(self, name) for name in PROBLEM_TENSORS]
        return (*own, *(tensor for teacher in self.teachers for tensor in teacher.tensors()))

    def sources(self) -> list[int]:
        """Each teacher's Source."""
        return [int(teacher.source) for teacher in self.teachers]

    @staticmethod
    def of(tensors: Sequence[Tensor | None], sources: Sequence[int]) -> Problem:
        own, width = len(PROBLEM_TENSORS), len(TEACHER_TENSORS)
        teachers = tuple(
            TeacherOperand(Source(source), *tensors[own + k * width : own + (k + 1) * width])
            for k, source in enumerate(sources)
        )
        named: dict[str, Any] = dict(zip(PROBLEM_TENSORS, tensors[:own], strict=True))
        return Problem(**named, teachers=teachers)


PROBLEM_TENSORS = tuple(each.name for each in fields(Problem) if each.name != "teachers")
TEACHER_TENSORS = tuple(each.name for each in fields(TeacherOperand) if each.name != "source")


def fields_along(kind: type[Problem] | type[TeacherOperand], axis: dict[str, str]) -> list[str]:
    """The fields of a problem or a teacher that run along ROWS or COLUMNS."""
    return [each.name for each in fields(kind) if each.metadata == axis]


def _sliced(operand: Problem | TeacherOperand, rows: slice, columns: slice) -> dict[str, Any]:
    """Every field that is given and runs along rows or columns, sliced."""
    taken = ((ROWS, rows), (COLUMNS, columns))
    return {
        name: getattr(operand, name)[part]
        for axis, part in taken
        for name in fields_along(type(operand), axis)
        if _given(operand, name)
    }


def _given(operand: Problem | TeacherOperand, name: str) -> bool:
    return getattr(operand, name) is not None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 accumulates in float64; float32, float16 and bfloat16 in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
