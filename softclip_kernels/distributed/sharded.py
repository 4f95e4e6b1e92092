"""The differentiable statistics of this rank's rows against every rank's columns, a visiting block at a time.

`laps.lap` brings the blocks and returns what the ranks contribute to each column; here is what is computed on one. Rows
accumulate where they live. A block's operands, its statistics and its gradient belong to the rank whose columns they
are, so nothing of more than a block's size is held, beyond vectors.

Shapes: n_local rows and m_local columns of this rank, M columns of a block, K teachers, T linear terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, ops
from ..problem import COLUMNS, Problem, TeacherOperand, fields_along
from ..stats import (
    ColumnBlock,
    InputGradients,
    LinearTerm,
    LossParts,
    SoftmaxStatistics,
    Statistics,
    StatisticsGradient,
    Wanted,
)
from . import laps
from .exchange import Layout


@dataclass(frozen=True)
class ColumnOperands:
    """What a block of columns brings: the parts of a Problem that belong to its columns, and the terms' operands. The
    embeddings travel in the exchange's dtype and are computed with in x's."""

    problem: Problem
    terms: tuple[LinearTerm, ...]
    layout: Layout

    def own(self) -> list[Tensor]:
        """This rank's, (m_local, ...) each, in the order that `block` takes them back."""
        holders: list[Problem | TeacherOperand] = [self.problem, *self.problem.teachers]
        given = [value for holder in holders for value in _column_fields(holder).values()]
        sent = [laps.as_sent(value, self.layout) if value.dim() == 2 else value for value in given]
        return [*sent, *(operand for term in self.terms for operand in term.column_operands())]

    def block(self, start: int, operands: Sequence[Tensor]) -> tuple[Problem, list[ColumnBlock]]:
        """The problem of this rank's rows and a block of columns that begins at the global column `start`, and what
        each term meets of it."""
        remaining = iter(operands)
        problem = replace(self.problem, **_taken(self.problem, remaining)).counted_from(start)
        teachers = tuple(replace(teacher, **_taken(teacher, remaining)) for teacher in problem.teachers)
        columns = [
            ColumnBlock(problem.y, start, [next(remaining) for _ in term.column_operands()]) for term in self.terms
        ]
        return replace(problem, teachers=teachers), columns

    def kept(self) -> tuple[list[Tensor | None], Callable[[Sequence[Tensor | None]], ColumnOperands]]:
        """Every tensor but x, y and scale, for save_for_backward, and what makes the operands again of all of them, x,
        y and scale first."""
        tensors, sources, layout = self.problem.tensors()[3:], self.problem.sources(), self.layout
        given = [_tensor_fields(term) for term in self.terms]
        hollow = [replace(term, **dict.fromkeys(values)) for term, values in zip(self.terms, given, strict=True)]
        names, width = [list(values) for values in given], 3 + len(tensors)

        def restored(tensors: Sequence[Tensor | None]) -> ColumnOperands:
            remaining = iter(tensors[width:])
            terms = [
                replace(term, **{name: next(remaining) for name in own})
                for term, own in zip(hollow, names, strict=True)
            ]
            return ColumnOperands(Problem.of(tensors[:width], sources), tuple(terms), layout)

        return [*tensors, *(value for values in given for value in values.values())], restored


def _column_fields(operand: Problem | TeacherOperand) -> dict[str, Tensor]:
    """What runs along the columns and is given, by name."""
    values = {name: getattr(operand, name) for name in fields_along(type(operand), COLUMNS)}
    return {name: value for name, value in values.items() if value is not None}


def _tensor_fields(term: Any) -> dict[str, Tensor]:
    values = {each.name: getattr(term, each.name) for each in fields(term)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _taken(operand: Problem | TeacherOperand, remaining: Iterator[Tensor]) -> dict[str, Any]:
    """A block's values of _column_fields, in the dtypes of this rank's own."""
    return {name: next(remaining).to(own.dtype) for name, own in _column_fields(operand).items()}


class _Results(NamedTuple):
    """What the Function returns: Statistics.tensors(), the terms' row dots and their column dots."""

    statistics: tuple[Tensor, ...]
    row_dots: tuple[Tensor, ...]
    column_dots: tuple[Tensor, ...]

    @staticmethod
    def of(flat: Sequence[Tensor], terms: int) -> _Results:
        """From results, or from their gradients, which come in the same order."""
        row_dots, column_dots = len(flat) - 2 * terms, len(flat) - terms
        return _Results(tuple(flat[:row_dots]), tuple(flat[row_dots:column_dots]), tuple(flat[column_dots:]))


def loss_parts(problem: Problem, terms: Sequence[LinearTerm], layout: Layout, backend: str) -> LossParts:
    """autograd.loss_parts of this rank's share of a global problem."""
    columns = ColumnOperands(problem, tuple(terms), layout)
    flat = _ShardedStatistics.apply(problem.x, problem.y, problem.scale, columns, backend)
    results = _Results.of(flat, len(terms))
    return LossParts(Statistics.of(*results.statistics), results.row_dots, results.column_dots)


class _ShardedStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, columns: ColumnOperands, backend: str
    ) -> tuple[Tensor, ...]:
        problem = columns.problem
        rows, _, positive, row_ranks, *_ = Statistics.empty(problem)
        like, ranked = positive.new_empty(0), problem.row_threshold is not None
        row_dots = [like.new_zeros(len(x)) for _ in columns.terms]

        def visit(start: int, operands: list[Tensor]) -> list[Tensor]:
            block, term_columns = columns.block(start, operands)
            part = _statistics(block, backend)
            rows.packed.copy_(rows.merge(part.rows).packed)
            positive.add_(part.positive_logit)
            row_ranks.add_(part.row_ranks)
            column_dots = like.new_zeros(block.columns, len(columns.terms))
            for k, (term, met) in enumerate(zip(columns.terms, term_columns, strict=True)):
                if block.is_empty:
                    continue
                row_dot, column_dots[:, k] = term.dots(block.x, met, block.scale)
                row_dots[k] += row_dot
            return [part.columns.packed.T, part.column_ranks.reshape(block.columns, int(ranked)), column_dots]

        def merge(ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            statistics = SoftmaxStatistics(ours[0].T).merge(SoftmaxStatistics(theirs[0].T))
            return [statistics.packed.T, ours[1] + theirs[1], ours[2] + theirs[2]]

        results = laps.lap(columns.own(), visit, columns.layout, merge)
        column_statistics, column_ranks, column_dots = results[0].T.contiguous(), results[1].flatten(), results[2]
        # Every tensor by save_for_backward, where hooks of saved tensors see it; `graph` depends on that.
        tensors, ctx.restored = columns.kept()
        ctx.backend, ctx.problem_tensors = backend, len(tensors)
        ctx.save_for_backward(x, y, scale, *tensors, rows.packed, column_statistics, positive)
        ctx.mark_non_differentiable(row_ranks, column_ranks)
        statistics = (rows.packed, column_statistics, positive, row_ranks, column_ranks)
        return *statistics, *row_dots, *column_dots.unbind(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, *saved = ctx.saved_tensors
        tensors, statistics = saved[: ctx.problem_tensors], saved[ctx.problem_tensors :]
        columns: ColumnOperands = ctx.restored([x.detach(), y.detach(), scale.detach(), *tensors])
        incoming = _Results.of(gradients, len(columns.terms))
        with torch.no_grad():
            results = _gradients(columns, Statistics.of(*statistics), incoming, ctx.needs_input_grad[:3], ctx.backend)
        return *ops.without_graph(results, (x, y, scale)), None, None


def _gradients(
    columns: ColumnOperands, own: Statistics, gradients: _Results, needed: tuple[bool, bool, bool], backend: str
) -> tuple[Tensor | None, ...]:
    """dx, dy and dscale of this rank, each where it is needed, from the gradients of everything that forward returned,
    in a second lap. Every rank contributes to every other's dy where any needs one."""
    problem, terms, layout = columns.problem, columns.terms, columns.layout
    gradient = StatisticsGradient.of(*gradients.statistics[:3])
    like = gradient.rows.new_empty(0)
    needs_x, needs_y, needs_scale = needed
    wanted = Wanted(needs_x, layout.columns_learn, needs_scale)
    dx, dscale = like.new_zeros(problem.x.shape if needs_x else 0), like.new_zeros(())
    problem_operands = columns.own()
    own_columns = [own.columns.packed.T, gradient.columns.T]
    if terms:
        own_columns.append(torch.stack(gradients.column_dots, 1))

    def visit(start: int, operands: list[Tensor]) -> list[Tensor]:
        block, term_columns = columns.block(start, operands[: len(problem_operands)])
        block_statistics, block_gradient, *dots_gradients = operands[len(problem_operands) :]
        if block.is_empty:
            return [like.new_zeros(block.y.shape)] if layout.columns_learn else []
        statistics = own._replace(columns=SoftmaxStatistics(block_statistics.T.contiguous()))
        incoming = gradient._replace(columns=block_gradient.T.contiguous())
        contributions = [ops.block_backward(block, statistics, incoming, wanted, backend)]
        for k, term in enumerate(terms):
            incoming_dots = (gradients.row_dots[k], dots_gradients[0][:, k])
            contributions.append(_dots_gradient(term, block, term_columns[k], incoming_dots, wanted))
        dy = None
        for block_dx, block_dy, block_dscale in contributions:
            if block_dx is not None:
                dx.add_(block_dx)
            if block_dscale is not None:
                dscale.add_(block_dscale)
            if block_dy is not None:
                dy = block_dy if dy is None else dy.add_(block_dy)
        return [] if dy is None else [dy]

    own_dy = laps.lap([*problem_operands, *own_columns], visit, layout)
    return (
        dx.to(problem.x.dtype) if needs_x else None,
        own_dy[0].to(problem.y.dtype) if own_dy and needs_y else None,
        dscale if needs_scale else None,
    )


def _statistics(block: Problem, backend: str) -> Statistics:
    """Statistics of a block that may lack rows or columns."""
    return Statistics.empty(block) if block.is_empty else backends.select(backend, block).forward(block)


def _dots_gradient(
    term: LinearTerm,
    block: Problem,
    columns: ColumnBlock,
    gradients: tuple[Tensor, Tensor],
    wanted: Wanted,
) -> InputGradients:
    """A linear term's dx, dy and dscale on one block from the gradients of its row dots (n_local,) and column dots
    (M,), by differentiating the term's own formula there. Leaves of the accumulation dtype, so that nothing is rounded
    before the blocks are added."""
    dtype = block.accumulation_dtype
    operands = ((block.x, wanted.x), (block.y, wanted.y), (block.scale, wanted.scale))
    leaves = [operand.detach().to(dtype).requires_grad_(needed) for operand, needed in operands]
    x, y, scale = leaves
    with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
        dots = term.dots(x, columns._replace(y=y), scale)
        found = iter(torch.autograd.grad(dots, [leaf for leaf in leaves if leaf.requires_grad], gradients))
    return InputGradients(*(next(found) if leaf.requires_grad else None for leaf in leaves))
