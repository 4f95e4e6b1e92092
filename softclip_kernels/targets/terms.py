"""What a target is a sum of (lowered.py): terms, each linear in the logits.

    Y_rows[i, j]    = sum over terms of  row_coefficient[i]    * term's row entry (i, j)
    Y_columns[i, j] = sum over terms of  column_coefficient[j] * term's column entry (i, j)
    row loss i      = row_weight[i] * (mass_i * logsumexp_j z_ij - sum_j Y_rows_ij z_ij),   mass_i = sum_j Y_rows_ij

A teacher term's entries are recomputed in the kernel's tile. A hard term's entries are a 0/1 or given matrix E whose
sums against z are O((N + M) D) algebra on the embeddings, in PyTorch, never in a kernel. Over ranks N and M are this
rank's shares: a coefficient, mass or loss lives on the rank whose row or column it belongs to, and only column indices
are global.

Lowering itself never communicates, so that ranks can agree that their targets fit before any of them waits for another;
`complete` then fills in what depends on other ranks, such as the number of matches of a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .. import autograd, checks
from ..distributed import laps
from ..distributed.exchange import Layout
from ..indexing import scatter_sum, take_rows
from ..linear_form import Coefficient, times
from ..problem import Problem, Source, TeacherOperand
from ..stats import ColumnBlock
from .context import Context

AnyTerm = TypeVar("AnyTerm", bound="Term")


@dataclass(frozen=True)
class Term:
    """row_coefficient (N,), column_coefficient (M,), accumulation dtype, or one number for all."""

    row_coefficient: Coefficient
    column_coefficient: Coefficient

    def scaled(self: AnyTerm, rows: Coefficient, columns: Coefficient) -> AnyTerm:
        changed = {
            "row_coefficient": times(self.row_coefficient, rows),
            "column_coefficient": times(self.column_coefficient, columns),
        }
        # Without dataclasses.replace, which takes six times as long.
        scaled = object.__new__(type(self))
        scaled.__dict__.update(self.__dict__ | changed)
        return scaled

    def structure(self) -> str:
        """What every rank's term must have in common."""
        return type(self).__name__


# Hard terms.


@dataclass(frozen=True)
class HardTerm(Term, ABC):
    """E is the same matrix for both directions. A stats.LinearTerm."""

    @abstractmethod
    def complete(self, context: Context) -> CompletedTerm:
        """With E's row and column sums, over all ranks."""

    def column_operands(self) -> tuple[Tensor, ...]:
        return ()

    @abstractmethod
    def dots(self, x: Tensor, columns: ColumnBlock, scale: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class CompletedTerm:
    """A hard term with the sums of its E over all ranks: of each row (N,) and of each column (M,), where these have a
    loss, or one number for all."""

    term: HardTerm
    row_sum: Coefficient
    column_sum: Coefficient


@dataclass(frozen=True)
class IndexTerm(HardTerm):
    """E_ij = 1 at j = index[i]: the positive of each row. index (N,) int64, global column numbers. `own`: on every rank
    the index names that rank's columns only. `diagonal`: row i of a rank names its column i, and there are as many.
    inverse (M,) int64: the row that names each column, where the columns' rank knows it."""

    index: Tensor
    own: bool = False
    diagonal: bool = False
    inverse: Tensor | None = None

    def complete(self, context: Context) -> CompletedTerm:
        if context.segments is not None and context.layout.exchange is None:
            row_segment, column_segment = context.segments
            checks.own_segments(row_segment, column_segment[self.index])
        if self.diagonal or context.direction == "rows":
            return CompletedTerm(self, 1.0, 1.0)
        ones = context.x.new_ones(len(self.index), dtype=context.layout.dtype)
        return CompletedTerm(self, 1.0, self.sum_to_columns(ones, context.layout))

    def sum_to_columns(self, values: Tensor, layout: Layout) -> Tensor:
        """The sum of the values (N,) of all ranks' rows at the column that each row's index names: (M,)."""
        return values if self.diagonal else laps.sum_to_columns(values, self.index, layout, self.own)

    def structure(self) -> str:
        return f"IndexTerm(own={self.own})"

    def dots(self, x: Tensor, columns: ColumnBlock, scale: Tensor) -> tuple[Tensor, Tensor]:
        y, index = columns.y, self.index - columns.start
        column = index.clamp(0, len(y) - 1)
        z = torch.where(column == index, scale * (x.to(scale.dtype) * take_rows(y, column).to(scale.dtype)).sum(1), 0.0)
        return z, scatter_sum(len(y), column, z)


@dataclass(frozen=True)
class GroupTerm(HardTerm):
    """E_ij = 1 where row_id[i] == column_id[j]; int64. Once complete, the coefficients let every row's and every
    column's matches share a mass of 1; one without a match has none."""

    row_id: Tensor
    column_id: Tensor

    def complete(self, context: Context) -> CompletedTerm:
        layout = context.layout
        row_count = _matches(self.row_id, laps.gather_columns(self.column_id, layout))
        column_count = _matches(self.column_id, laps.gather_rows(self.row_id, layout))
        row_sum, column_sum = row_count.to(layout.dtype), column_count.to(layout.dtype)
        shares = (torch.where(count > 0, 1 / count.clamp(min=1), 0.0) for count in (row_sum, column_sum))
        return CompletedTerm(self.scaled(*shares), row_sum, column_sum)

    def column_operands(self) -> tuple[Tensor, ...]:
        return (self.column_id,)

    def dots(self, x: Tensor, columns: ColumnBlock, scale: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x.to(scale.dtype), columns.y.to(scale.dtype)
        row_group, column_group, groups = _places(self.row_id, columns.operands[0])
        x_of_group = scatter_sum(groups, row_group, x)
        y_of_group = scatter_sum(groups, column_group, y)
        row_dot = scale * (x * take_rows(y_of_group, row_group)).sum(1)
        column_dot = scale * (y * take_rows(x_of_group, column_group)).sum(1)
        return row_dot, column_dot


def _places(row_id: Tensor, column_id: Tensor) -> tuple[Tensor, Tensor, int]:
    """Ids as their place among the sorted column ids, so that shapes do not depend on values: row groups, column groups
    and how many there may be. Ids that no column has share one last group without columns."""
    ordered = column_id.sort().values
    place = torch.searchsorted(ordered, row_id.contiguous())
    known = (place < len(ordered)) & (ordered[place.clamp(max=len(ordered) - 1)] == row_id)
    column_place = torch.searchsorted(ordered, column_id.contiguous())
    return torch.where(known, place, len(ordered)), column_place, len(ordered) + 1


def _matches(ids: Tensor, others: Tensor) -> Tensor:
    """How many of the others equal each id."""
    ordered = others.sort().values
    ids = ids.contiguous()
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


@dataclass(frozen=True)
class DenseTerm(HardTerm):
    """E given as a matrix (N, columns of all ranks)."""

    matrix: Tensor

    def complete(self, context: Context) -> CompletedTerm:
        return CompletedTerm(self, self.matrix.sum(1), laps.sum_columns(self.matrix.sum(0), context.layout))

    def dots(self, x: Tensor, columns: ColumnBlock, scale: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x.to(scale.dtype), columns.y.to(scale.dtype)
        matrix = self.matrix[:, columns.start : columns.start + len(y)]
        row_dot = scale * (x * (matrix @ y)).sum(1)
        column_dot = scale * (y * (matrix.T @ x)).sum(1)
        return row_dot, column_dot


# Teacher terms.


@dataclass(frozen=True)
class TeacherTerm(Term):
    """Row entries exp(t_ij + column_bias_j + row_potential_i), where a row_potential of None stands for the one that
    makes the row sum to 1; column entries likewise with row_bias and column_potential. Potentials (N,) and (M,)."""

    operand: TeacherOperand
    row_potential: Tensor | None = None
    column_potential: Tensor | None = None

    def complete(self, context: Context) -> TeacherTerm:
        """With the potentials that depend on the whole batch."""
        return self

    def with_biases(self, row: Tensor, column: Tensor) -> TeacherTerm:
        return replace(self, operand=replace(self.operand, row_bias=row, column_bias=column))

    def structure(self) -> str:
        operand = self.operand
        given = [name for name in ("scale", "row_bias", "column_bias") if getattr(operand, name) is not None]
        width = "" if operand.x is None else f" of width {operand.x.shape[1]}, {operand.x.dtype}"
        return f"{type(self).__name__}({operand.source.name}{width}{''.join(f', {name}' for name in given)})"


@dataclass(frozen=True)
class ColumnNormalizedTerm(TeacherTerm):
    """A teacher whose potentials are the other direction's log-sum-exps."""

    def complete(self, context: Context) -> TeacherTerm:
        row, column = (_normalizing(lse) for lse in _log_sum_exps(context, self.operand))
        return replace(
            self, row_potential=torch.zeros_like(row), column_potential=torch.zeros_like(column)
        ).with_biases(row, column)


@dataclass(frozen=True)
class SinkhornTerm(TeacherTerm):
    """A teacher whose potentials come from normalizing rows and columns in turn."""

    iterations: int = 5

    def complete(self, context: Context) -> TeacherTerm:
        row, column = (context.x.new_zeros(len(each), dtype=context.layout.dtype) for each in (context.x, context.y))
        for _ in range(self.iterations):
            column = _normalizing(_log_sum_exps(context, replace(self.operand, row_bias=row, column_bias=column))[1])
            row = _normalizing(_log_sum_exps(context, replace(self.operand, row_bias=row, column_bias=column))[0])
        return replace(self, row_potential=row, column_potential=column).with_biases(row, column)

    def structure(self) -> str:
        return f"{super().structure()}, {self.iterations} iterations"


def _log_sum_exps(context: Context, operand: TeacherOperand) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over columns of `t + column_bias` (N,) and over rows of `t + row_bias` (M,), over the whole batch."""
    row_segment, column_segment = context.segments or (None, None)
    x, y, scale = context.x, context.y, context.scale
    if operand.source == Source.EMBEDDINGS:  # the teacher's own similarity is the cheaper problem to ride on
        assert operand.x is not None and operand.y is not None and operand.scale is not None
        x, y, scale = operand.x, operand.y, operand.scale
        if x.dtype != context.x.dtype:  # a backend takes the student's dtype, and a teacher of any
            x, y = x.to(context.layout.dtype), y.to(context.layout.dtype)
        operand = replace(operand, source=Source.LOGITS, scale=None, x=None, y=None)
    problem = Problem(x, y, scale, row_segment=row_segment, column_segment=column_segment, teachers=(operand,))
    statistics = autograd.loss_parts(problem, (), context.layout, context.backend).statistics
    rows, columns = statistics.rows.teacher_lse[0], statistics.columns.teacher_lse[0]
    return rows.to(context.layout.dtype), columns.to(context.layout.dtype)


def _normalizing(log_sum_exp: Tensor) -> Tensor:
    """The potential that makes a row (column) sum to 1; one that sees nothing is excluded."""
    return torch.where(log_sum_exp == -torch.inf, -torch.inf, -log_sum_exp)
