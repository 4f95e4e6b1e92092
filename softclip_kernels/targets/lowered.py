"""What every target becomes: a sum of terms, with what applies to the whole, and the losses that follow from it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..distributed.exchange import Layout
from ..linear_form import Coefficient, LinearForm, LinearForms, plus, times
from ..problem import Problem
from ..stats import LossParts, SoftmaxStatistics, Statistics
from .context import Context
from .terms import CompletedTerm, HardTerm, IndexTerm, TeacherTerm


@dataclass(frozen=True)
class LoweredTarget:
    """A sum of terms, with what applies to the whole.

    positive       the term that gives every row its positive, which the kernels compute; None where there is none
    linear         the other hard terms
    teachers       the soft terms
    row_weight     (N,) of each row's loss, or one number, or None: 1
    column_weight  (M,) of each column's loss
    segments       (row (N,), column (M,)) int64: a row sees the columns of its segment; None: all
    step           the optimizer's step that it was made for, where it changes with them
    """

    positive: IndexTerm | None = None
    linear: tuple[HardTerm, ...] = ()
    teachers: tuple[TeacherTerm, ...] = ()
    row_weight: Coefficient | None = None
    column_weight: Coefficient | None = None
    segments: tuple[Tensor, Tensor] | None = None
    step: int | None = None

    def scaled(self, rows: Coefficient, columns: Coefficient) -> LoweredTarget:
        """Every entry of row i times rows[i], of column j times columns[j]: the entries, not the losses' weights."""
        return LoweredTarget(
            None if self.positive is None else self.positive.scaled(rows, columns),
            tuple([term.scaled(rows, columns) for term in self.linear]),
            tuple([term.scaled(rows, columns) for term in self.teachers]),
            self.row_weight,
            self.column_weight,
            self.segments,
            self.step,
        )

    def plus(self, other: LoweredTarget) -> LoweredTarget:
        """The sum of the two targets' entries."""
        if any(part.row_weight is not None or part.segments is not None for part in (self, other)):
            raise ValueError("Weighted and Blocks apply to a whole target: wrap the mixture, not one of its parts")
        positive, linear = self.positive or other.positive, self.linear
        if self.positive is not None and other.positive is not None:  # a kernel computes one positive a row
            linear = (*linear, other.positive)
        return LoweredTarget(
            positive,
            linear + other.linear,
            self.teachers + other.teachers,
            step=other.step if self.step is None else self.step,
        )

    def weighted(self, rows: Coefficient, columns: Coefficient) -> LoweredTarget:
        """The losses, not the entries, times these."""
        if self.row_weight is not None and self.column_weight is not None:
            rows, columns = times(rows, self.row_weight), times(columns, self.column_weight)
        return replace(self, row_weight=rows, column_weight=columns)

    def structure(self) -> str:
        """What every rank's target must have in common, for an exchange to fit."""
        hard = self.linear if self.positive is None else (self.positive, *self.linear)
        terms = [term.structure() for term in (*hard, *self.teachers)]
        given = [name for name in ("row_weight", "segments") if getattr(self, name) is not None]
        given += [] if self.step is None else [f"step {self.step}"]
        return " + ".join(terms) + "".join(f", {name}" for name in given)

    def problem(self, x: Tensor, y: Tensor, scale: Tensor) -> Problem:
        row_segment, column_segment = self.segments or (None, None)
        return Problem(
            x,
            y,
            scale,
            positive_column=None if self.positive is None else self.positive.index,
            positive_row=None if self.positive is None else self.positive.inverse,
            row_segment=row_segment,
            column_segment=column_segment,
            teachers=tuple(term.operand for term in self.teachers),
        )

    def complete(self, context: Context) -> CompletedTarget:
        """With what depends on other ranks; the only step that communicates."""
        if self.segments is not None:
            context = replace(context, segments=self.segments)
        teachers = tuple([term.complete(context) for term in self.teachers])
        changed = any(map(operator.is_not, teachers, self.teachers))
        return CompletedTarget(
            None if self.positive is None else self.positive.complete(context),
            tuple([term.complete(context) for term in self.linear]),
            replace(self, teachers=teachers) if changed else self,
        )


@dataclass(frozen=True)
class CompletedTarget:
    """A target of which everything is known but the statistics. `lowered` has completed teachers; its hard terms are
    superseded by those here."""

    positive: CompletedTerm | None
    linear: tuple[CompletedTerm, ...]
    lowered: LoweredTarget

    def linear_terms(self) -> tuple[HardTerm, ...]:
        """The terms whose dots are PyTorch's work."""
        return tuple(completed.term for completed in self.linear)

    def known_forms(self, direction: str = "both") -> LinearForms | None:
        """The `forms`; None where they depend on the statistics."""
        lowered = self.lowered
        if lowered.segments is not None:
            return None
        for teacher in lowered.teachers:
            if teacher.row_potential is not None or teacher.column_potential is not None:
                return None
        return self._forms(None, None, direction)

    def forms(self, statistics: Statistics, direction: str = "both") -> LinearForms:
        """The row losses and the column losses as linear functions of the statistics, which teachers' masses may depend
        on; None for a direction that is not asked for. The positives' dots are the first."""
        return self._forms(statistics.rows, statistics.columns, direction)

    def _forms(
        self, of_rows: SoftmaxStatistics | None, of_columns: SoftmaxStatistics | None, direction: str
    ) -> LinearForms:
        lowered = self.lowered
        terms = self.linear if self.positive is None else (self.positive, *self.linear)
        rows = columns = None
        segmented = lowered.segments is not None
        if direction != "columns":
            hard = [(each.term.row_coefficient, each.row_sum) for each in terms]
            soft = [(each.row_coefficient, each.row_potential) for each in lowered.teachers]
            rows = _form(of_rows, hard, soft, lowered.row_weight, segmented)
        if direction == "both" and self._is_alike_in_both_directions:
            columns = rows
        elif direction != "rows":
            hard = [(each.term.column_coefficient, each.column_sum) for each in terms]
            soft = [(each.column_coefficient, each.column_potential) for each in lowered.teachers]
            columns = _form(of_columns, hard, soft, lowered.column_weight, segmented)
        return LinearForms(rows, columns)

    @property
    def _is_alike_in_both_directions(self) -> bool:
        """Whether both have one linear form, whatever the statistics."""
        lowered = self.lowered
        if lowered.segments is not None or not _alike(lowered.row_weight, lowered.column_weight):
            return False
        terms = self.linear if self.positive is None else (self.positive, *self.linear)
        for each in terms:
            if not _alike(each.term.row_coefficient, each.term.column_coefficient):
                return False
            if not _alike(each.row_sum, each.column_sum):
                return False
        for teacher in lowered.teachers:
            if teacher.row_potential is not None or teacher.column_potential is not None:
                return False
            if not _alike(teacher.row_coefficient, teacher.column_coefficient):
                return False
        return True

    def losses(self, forms: LinearForms, parts: LossParts, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
        """Row losses (N,) and column losses (M,) of the forms; None for a direction that they lack."""
        statistics, positive = parts.statistics, self.lowered.positive
        row_form, column_form = forms
        rows = columns = None
        if row_form is not None:
            dots = [] if positive is None else [statistics.positive_logit]
            rows = row_form.losses(statistics.rows, [*dots, *parts.row_dots])
        if column_form is not None:
            dots = [] if positive is None else [positive.sum_to_columns(statistics.positive_logit, layout)]
            columns = column_form.losses(statistics.columns, [*dots, *parts.column_dots])
        return rows, columns


def _alike(row: Coefficient | None, column: Coefficient | None) -> bool:
    return row is column or (isinstance(row, float) and isinstance(column, float) and row == column)


def _form(
    statistics: SoftmaxStatistics | None,
    hard: list[tuple[Coefficient, Coefficient]],
    soft: list[tuple[Coefficient, Tensor | None]],
    weight: Coefficient | None,
    segmented: bool,
) -> LinearForm:
    """One direction's, from hard terms' coefficients and sums, and teachers' coefficients and potentials; statistics
    where there are potentials or segments."""
    means = tuple(
        coefficient
        if potential is None or statistics is None
        else _teacher_mass(coefficient, potential, statistics.teacher_lse[k])
        for k, (coefficient, potential) in enumerate(soft)
    )
    mass: Coefficient = 0.0
    for part in (*(times(coefficient, total) for coefficient, total in hard), *means):
        mass = plus(mass, part)
    seen = None
    if segmented and statistics is not None:
        seen = statistics.lse.detach() != -torch.inf
        mass = seen.to(statistics.lse.dtype) * mass
    dots = tuple(coefficient for coefficient, _ in hard)
    return LinearForm(mass, dots, means, 1.0 if weight is None else weight, seen)


def _teacher_mass(coefficient: Coefficient, potential: Tensor, log_sum_exp: Tensor) -> Tensor:
    return times(coefficient, (log_sum_exp.detach() + potential).exp())
