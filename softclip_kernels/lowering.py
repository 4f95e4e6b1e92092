"""What every target becomes: a sum of terms, each linear in the logits.

    Y_rows[i, j]    = sum over terms of  row_coefficient[i]    * term's row entry (i, j)
    Y_columns[i, j] = sum over terms of  column_coefficient[j] * term's column entry (i, j)
    row loss i      = row_weight[i] * (mass_i * logsumexp_j z_ij - sum_j Y_rows_ij z_ij),   mass_i = sum_j Y_rows_ij

A teacher term's entries are recomputed in the kernel's tile. A hard term's entries are a 0/1 or given matrix E whose
sums against z are O((N + M) D) algebra on the embeddings, in PyTorch, never in a kernel. Over ranks N and M are this
rank's shares: a coefficient, mass or loss lives on the rank whose row or column it belongs to, and only column indices
are global.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from . import checks, distributed
from .indexing import row_slices, scatter_sum, take_rows
from .layout import Layout
from .problem import LossParts, Problem, TeacherOperand

if TYPE_CHECKING:
    from .targets import Context

AnyTerm = TypeVar("AnyTerm", bound="Term")


@dataclass(frozen=True)
class Term:
    """row_coefficient (N,), column_coefficient (M,), accumulation dtype."""

    row_coefficient: Tensor
    column_coefficient: Tensor

    def scaled(self: AnyTerm, rows: Tensor | float, columns: Tensor | float) -> AnyTerm:
        return replace(
            self, row_coefficient=self.row_coefficient * rows, column_coefficient=self.column_coefficient * columns
        )

    def complete(self, context: Context) -> Term:
        """With everything that takes other ranks to know. Lowering itself never communicates, so that ranks can agree
        that their targets fit before any of them waits for another."""
        return self

    def structure(self) -> str:
        """What every rank's term must have in common."""
        return type(self).__name__


@dataclass(frozen=True)
class TeacherTerm(Term):
    """Row entries exp(t_ij + column_bias_j + row_potential_i), where a row_potential of None stands for the one that
    makes the row sum to 1; column entries likewise with row_bias and column_potential. Potentials (N,) and (M,)."""

    operand: TeacherOperand
    row_potential: Tensor | None = None
    column_potential: Tensor | None = None

    def complete(self, context: Context) -> TeacherTerm:
        return self

    def with_biases(self, row: Tensor, column: Tensor) -> TeacherTerm:
        return replace(self, operand=replace(self.operand, row_bias=row, column_bias=column))

    def structure(self) -> str:
        operand = self.operand
        given = [name for name in ("scale", "row_bias", "column_bias") if getattr(operand, name) is not None]
        width = "" if operand.x is None else f" of width {operand.x.shape[1]}, {operand.x.dtype}"
        return f"{type(self).__name__}({operand.source.name}{width}{''.join(f', {name}' for name in given)})"


@dataclass(frozen=True)
class HardTerm(Term):
    """E is the same matrix for both directions. `sums` are E's row sums (N,) and column sums (M,), over all ranks;
    known once the term is complete. A problem.LinearTerm."""

    sums: tuple[Tensor, Tensor] = field(kw_only=True, default=None)  # type: ignore[assignment]

    def complete(self, context: Context) -> HardTerm:
        raise NotImplementedError

    def column_operands(self) -> tuple[Tensor, ...]:
        return ()

    def dots(
        self, x: Tensor, y: Tensor, scale: Tensor, start: int, operands: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class IndexTerm(HardTerm):
    """E_ij = 1 at j = index[i]: the positive of each row. index (N,) int64, global column numbers. `own`: on every rank
    the index names that rank's columns only."""

    index: Tensor
    own: bool = False

    def complete(self, context: Context) -> IndexTerm:
        if context.segments is not None and context.layout.exchange is None:
            row_segment, column_segment = context.segments
            checks.own_segments(row_segment, column_segment[self.index])
        ones = torch.ones_like(self.row_coefficient)
        return replace(self, sums=(ones, distributed.sum_to_columns(ones, self.index, context.layout, self.own)))

    def structure(self) -> str:
        return f"IndexTerm(own={self.own})"

    def dots(
        self, x: Tensor, y: Tensor, scale: Tensor, start: int, operands: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        index = self.index - start
        column = index.clamp(0, len(y) - 1)
        z = torch.where(column == index, scale * (x.to(scale.dtype) * take_rows(y, column).to(scale.dtype)).sum(1), 0.0)
        return z, scatter_sum(len(y), column, z)


@dataclass(frozen=True)
class GroupTerm(HardTerm):
    """E_ij = 1 where row_id[i] == column_id[j]; int64. Once complete, the coefficients let every row's and every
    column's matches share a mass of 1; one without a match has none."""

    row_id: Tensor
    column_id: Tensor

    def complete(self, context: Context) -> GroupTerm:
        row_count, column_count = (
            _matches(own, everyone)
            for own, everyone in (
                (self.row_id, distributed.gather_columns(self.column_id, context.layout)),
                (self.column_id, distributed.gather_rows(self.row_id, context.layout)),
            )
        )
        dtype = context.layout.dtype
        term = replace(self, sums=(row_count.to(dtype), column_count.to(dtype)))
        return term.scaled(*(torch.where(count > 0, 1 / count.clamp(min=1), 0.0) for count in term.sums))

    def column_operands(self) -> tuple[Tensor, ...]:
        return (self.column_id,)

    def dots(
        self, x: Tensor, y: Tensor, scale: Tensor, start: int, operands: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        x, y = x.to(scale.dtype), y.to(scale.dtype)
        row_group, column_group, groups = _places(self.row_id, operands[0])
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

    def complete(self, context: Context) -> DenseTerm:
        return replace(self, sums=(self.matrix.sum(1), distributed.sum_columns(self.matrix.sum(0), context.layout)))

    def dots(
        self, x: Tensor, y: Tensor, scale: Tensor, start: int, operands: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        x, y, matrix = x.to(scale.dtype), y.to(scale.dtype), self.matrix[:, start : start + len(y)]
        row_dot = scale * (x * (matrix @ y)).sum(1)
        column_dot = scale * (y * (matrix.T @ x)).sum(1)
        return row_dot, column_dot


@dataclass(frozen=True)
class LoweredTarget:
    """Terms, per-row and per-column weights (None: 1), and segments (row (N,), column (M,); None: one segment)."""

    hard: tuple[HardTerm, ...] = ()
    teachers: tuple[TeacherTerm, ...] = ()
    row_weight: Tensor | None = None
    column_weight: Tensor | None = None
    segments: tuple[Tensor, Tensor] | None = None

    def scaled(self, rows: Tensor | float, columns: Tensor | float) -> LoweredTarget:
        """Every entry of row i times rows[i], of column j times columns[j]: the entries, not the losses' weights."""
        return replace(
            self,
            hard=tuple(term.scaled(rows, columns) for term in self.hard),
            teachers=tuple(term.scaled(rows, columns) for term in self.teachers),
        )

    def plus(self, other: LoweredTarget) -> LoweredTarget:
        """The sum of the two targets' entries."""
        if any(part.row_weight is not None or part.segments is not None for part in (self, other)):
            raise ValueError("Weighted and Blocks apply to a whole target: wrap the mixture, not one of its parts")
        return replace(self, hard=self.hard + other.hard, teachers=self.teachers + other.teachers)

    def weighted(self, rows: Tensor, columns: Tensor) -> LoweredTarget:
        """The losses, not the entries, times these."""
        if self.row_weight is not None and self.column_weight is not None:
            rows, columns = rows * self.row_weight, columns * self.column_weight
        return replace(self, row_weight=rows, column_weight=columns)

    def complete(self, context: Context) -> LoweredTarget:
        """Every term complete: see Term.complete."""
        context = replace(context, segments=self.segments)
        return replace(
            self,
            hard=tuple(term.complete(context) for term in self.hard),
            teachers=tuple(term.complete(context) for term in self.teachers),
        )

    def structure(self) -> str:
        """What every rank's target must have in common, for an exchange to fit."""
        terms = [term.structure() for term in (*self.hard, *self.teachers)]
        given = [name for name in ("row_weight", "segments") if getattr(self, name) is not None]
        return " + ".join(terms) + "".join(f", {name}" for name in given)

    @property
    def indexed(self) -> IndexTerm | None:
        """The term that gives every row its positive, where the target has one: the first IndexTerm."""
        return next((term for term in self.hard if isinstance(term, IndexTerm)), None)

    @property
    def positive_column(self) -> Tensor | None:
        """The index of every row's positive (N,)."""
        return None if self.indexed is None else self.indexed.index

    @property
    def linear(self) -> tuple[HardTerm, ...]:
        """The terms whose dots are not the kernel's own positive logits."""
        return tuple(term for term in self.hard if term is not self.indexed)

    def problem(self, x: Tensor, y: Tensor, scale: Tensor) -> Problem:
        row_segment, column_segment = self.segments or (None, None)
        operands = tuple(term.operand for term in self.teachers)
        return Problem(x, y, scale, self.positive_column, row_segment, column_segment, operands)

    def losses(self, parts: LossParts, layout: Layout) -> tuple[Tensor, Tensor]:
        """Row losses (N,) and column losses (M,); the target must be complete."""
        statistics = parts.statistics
        row_mass, row_dot = _zeros(statistics.rows[0], 2)
        column_mass, column_dot = _zeros(statistics.columns[0], 2)
        linear_dots = zip(parts.row_dots, parts.column_dots, strict=True)
        for hard in self.hard:
            if isinstance(hard, IndexTerm) and hard is self.indexed:
                positive = statistics.positive_logit
                dots = positive, distributed.sum_to_columns(positive, hard.index, layout, hard.own)
            else:
                dots = next(linear_dots)
            row_mass = row_mass + hard.row_coefficient * hard.sums[0]
            row_dot = row_dot + hard.row_coefficient * dots[0]
            column_mass = column_mass + hard.column_coefficient * hard.sums[1]
            column_dot = column_dot + hard.column_coefficient * dots[1]
        for k, teacher in enumerate(self.teachers):
            mass, dot = _teacher_sums(teacher.row_coefficient, teacher.row_potential, statistics.rows, k)
            row_mass, row_dot = row_mass + mass, row_dot + dot
            mass, dot = _teacher_sums(teacher.column_coefficient, teacher.column_potential, statistics.columns, k)
            column_mass, column_dot = column_mass + mass, column_dot + dot
        return (
            _weighted_loss(self.row_weight, row_mass, statistics.rows[0], row_dot),
            _weighted_loss(self.column_weight, column_mass, statistics.columns[0], column_dot),
        )


def _zeros(like: Tensor, count: int) -> Tensor:
    return torch.zeros(count, *like.shape, dtype=like.dtype, device=like.device)


def _teacher_sums(coefficient: Tensor, potential: Tensor | None, statistic: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A teacher's mass and dot in one direction: `mass * (mean logit under its normalised distribution)`."""
    mass = coefficient if potential is None else coefficient * (statistic[1 + 2 * k].detach() + potential).exp()
    return mass, mass * statistic[2 + 2 * k]


def _weighted_loss(weight: Tensor | None, mass: Tensor, log_sum_exp: Tensor, dot: Tensor) -> Tensor:
    # A row that sees no column at all has a log-sum-exp of -inf, and contributes nothing.
    loss = mass * torch.where(log_sum_exp == -torch.inf, 0.0, log_sum_exp) - dot
    return loss if weight is None else weight * loss


@torch.no_grad()
def positive_logits(problem: Problem, own: bool, layout: Layout) -> tuple[Tensor, Tensor]:
    """`z[i, positive[i]]` (N,) without the kernel, and the size its rounding is relative to,
    `scale * norm(x[i]) * norm(y[positive[i]])` (N,). `own`: see IndexTerm; otherwise it takes a lap of its own."""
    assert problem.positive_column is not None
    positive, dtype = problem.positive_column, problem.accumulation_dtype
    logits, sizes = (problem.x.new_zeros(problem.rows, dtype=dtype) for _ in range(2))

    def visit(start: int, operands: list[Tensor]) -> list[Tensor]:
        block = operands[0].to(problem.y.dtype)
        for part in row_slices(problem.x) if len(block) else ():
            column = (positive[part] - start).clamp(0, len(block) - 1)
            inside, x, y = column == positive[part] - start, problem.x[part].to(dtype), block[column].to(dtype)
            logits[part] += torch.where(inside, problem.scale * (x * y).sum(1), 0.0)
            sizes[part] += torch.where(inside, problem.scale * x.norm(dim=1) * y.norm(dim=1), 0.0)
        return []

    columns = [distributed.travelling(problem.y, layout)]
    if own:
        visit(layout.column_start, columns)
    else:
        distributed.lap(columns, visit, layout)
    return logits, sizes
