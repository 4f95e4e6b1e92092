"""The differentiable statistics of this rank's rows against every rank's columns, a visiting block at a time.

`distributed.lap` brings the blocks and returns what the ranks contribute to each column; here is what is computed on
one. Rows accumulate where they live. A block's operands, its statistics and its gradient belong to the rank whose
columns they are, so nothing of more than a block's size is held, beyond vectors.

Shapes: n_local rows and m_local columns of this rank, m_b columns of a block, K teachers, T linear terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import distributed, ops, stats
from .layout import Layout
from .problem import LinearTerm, LossParts, Problem, Statistics, TeacherOperand


@dataclass(frozen=True)
class Columns:
    """What a block of columns brings: the parts of a Problem that belong to its columns, and the terms' operands. The
    embeddings travel in the exchange's dtype and are computed with in x's."""

    problem: Problem
    terms: tuple[LinearTerm, ...]
    layout: Layout

    def operands(self) -> list[Tensor]:
        """This rank's own, (m_local, ...) each, in the order that `block` takes them back."""
        problem = self.problem
        embeddings = [problem.y, *(teacher.y for teacher in problem.teachers if teacher.y is not None)]
        vectors = [problem.column_segment, problem.column_threshold]
        vectors += [teacher.column_bias for teacher in problem.teachers]
        return [
            *(distributed.travelling(embedding, self.layout) for embedding in embeddings),
            *(vector for vector in vectors if vector is not None),
            *(operand for term in self.terms for operand in term.column_operands()),
        ]

    def block(self, start: int, operands: Sequence[Tensor]) -> tuple[Problem, list[list[Tensor]]]:
        """The problem of this rank's rows and a block of columns that begins at the global column `start`, and each
        term's operands."""
        remaining = iter(operands)

        def embedding(own: Tensor) -> Tensor:
            return next(remaining).to(own.dtype)

        def vector(own: Tensor | None) -> Tensor | None:
            return None if own is None else next(remaining)

        problem = self.problem
        y = embedding(problem.y)
        teacher_y = [None if teacher.y is None else embedding(teacher.y) for teacher in problem.teachers]
        segment, threshold = vector(problem.column_segment), vector(problem.column_threshold)
        teachers: list[TeacherOperand] = []
        for teacher, columns in zip(problem.teachers, teacher_y, strict=True):
            teachers.append(replace(teacher, y=columns, column_bias=vector(teacher.column_bias)))
        block = replace(
            problem,
            y=y,
            positive_column=None if problem.positive_column is None else problem.positive_column - start,
            column_segment=segment,
            column_threshold=threshold,
            teachers=tuple(teachers),
        )
        return block, [[next(remaining) for _ in term.column_operands()] for term in self.terms]


def loss_parts(problem: Problem, terms: Sequence[LinearTerm], layout: Layout, backend: str) -> LossParts:
    """autograd.loss_parts of this rank's share of a global problem."""
    columns = Columns(problem, tuple(terms), layout)
    rows, column_statistics, positive, row_ranks, column_ranks, *dots = _ShardedStatistics.apply(
        problem.x, problem.y, problem.scale, columns, backend
    )
    return LossParts(
        Statistics(rows, column_statistics, positive, row_ranks, column_ranks),
        tuple(dots[: len(terms)]),
        tuple(dots[len(terms) :]),
    )


class _ShardedStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, columns: Columns, backend: str) -> tuple[Tensor, ...]:
        problem, teachers = columns.problem, len(columns.problem.teachers)
        like = x.new_empty(0, dtype=problem.accumulation_dtype)
        rows = stats.empty(teachers, len(x), like)
        positive = like.new_zeros(len(x) if problem.positive_column is not None else 0)
        ranked = problem.row_threshold is not None
        row_ranks = torch.zeros(len(x) if ranked else 0, dtype=torch.int64, device=x.device)
        row_dots = [like.new_zeros(len(x)) for _ in columns.terms]

        def visit(start: int, operands: list[Tensor]) -> list[Tensor]:
            block, term_operands = columns.block(start, operands)
            part = _statistics(block, backend)
            rows.copy_(stats.merge(rows, part.rows))
            positive.add_(part.positive_logit)
            row_ranks.add_(part.row_ranks)
            column_dots = like.new_zeros(block.columns, len(columns.terms))
            for k, (term, known) in enumerate(zip(columns.terms, term_operands, strict=True)):
                if 0 in (block.rows, block.columns):
                    continue
                row_dot, column_dots[:, k] = term.dots(block.x, block.y, block.scale, start, known)
                row_dots[k] += row_dot
            return [part.columns.T, part.column_ranks.reshape(block.columns, int(ranked)), column_dots]

        def merge(ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [stats.merge(ours[0].T, theirs[0].T).T, ours[1] + theirs[1], ours[2] + theirs[2]]

        results = distributed.lap(columns.operands(), visit, columns.layout, merge)
        column_statistics, column_ranks, column_dots = results[0].T.contiguous(), results[1].flatten(), results[2]
        ctx.backend, ctx.layout, ctx.terms = backend, columns.layout, columns.terms
        ctx.problem = replace(problem, x=x.detach(), y=y.detach(), scale=scale.detach())
        ctx.save_for_backward(x, y, scale, rows, column_statistics, positive)
        ctx.mark_non_differentiable(row_ranks, column_ranks)
        return rows, column_statistics, positive, row_ranks, column_ranks, *row_dots, *column_dots.unbind(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, rows, column_statistics, positive = ctx.saved_tensors
        with torch.no_grad():
            found = _gradients(ctx, rows, column_statistics, positive, gradients)
        return *ops.without_graph(found, (x, y, scale)), None, None


def _gradients(
    ctx: Any, rows: Tensor, column_statistics: Tensor, positive: Tensor, gradients: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy and dscale of this rank from the gradients of everything that forward returned, in a second lap."""
    problem: Problem = ctx.problem
    columns = Columns(problem, ctx.terms, ctx.layout)
    grad_rows, grad_columns, grad_positive = gradients[0][0::2].contiguous(), gradients[1][0::2], gradients[2]
    grad_row_dots, grad_column_dots = gradients[5 : 5 + len(ctx.terms)], gradients[5 + len(ctx.terms) :]
    like = gradients[0].new_empty(0)
    dx = like.new_zeros(problem.x.shape)
    dscale = like.new_zeros(())
    travelling = columns.operands()
    own = [column_statistics.T, grad_columns.T]
    if ctx.terms:
        own.append(torch.stack(grad_column_dots, 1))

    def visit(start: int, operands: list[Tensor]) -> list[Tensor]:
        block, term_operands = columns.block(start, operands[: len(travelling)])
        block_statistics, block_gradient = (operand.T.contiguous() for operand in operands[len(travelling) :][:2])
        known = Statistics(rows, block_statistics, positive, _no_ranks(rows), _no_ranks(rows))
        if 0 in (block.rows, block.columns):
            return [like.new_zeros(block.y.shape)]
        block_dx, dy, block_dscale = ops.block_backward(
            block, known, grad_rows, block_gradient, grad_positive, ctx.backend
        )
        dx.add_(block_dx)
        dscale.add_(block_dscale)
        for k, term in enumerate(ctx.terms):
            term_dx, term_dy, term_dscale = _dots_gradient(
                term, block, start, term_operands[k], grad_row_dots[k], operands[-1][:, k]
            )
            dx.add_(term_dx)
            dy.add_(term_dy)
            dscale.add_(term_dscale)
        return [dy]

    (dy,) = distributed.lap([*travelling, *own], visit, ctx.layout)
    return dx.to(problem.x.dtype), dy.to(problem.y.dtype), dscale


def _statistics(block: Problem, backend: str) -> Statistics:
    """Statistics of a block that may lack rows or columns."""
    if 0 not in (block.rows, block.columns):
        return ops.block_forward(block, backend)
    like = block.x.new_empty(0, dtype=block.accumulation_dtype)
    ranked = block.row_threshold is not None
    return Statistics(
        stats.empty(len(block.teachers), block.rows, like),
        stats.empty(len(block.teachers), block.columns, like),
        like.new_zeros(0 if block.positive_column is None else block.rows),
        *(torch.zeros(n if ranked else 0, dtype=torch.int64, device=like.device) for n in (block.rows, block.columns)),
    )


def _no_ranks(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=like.device)


def _dots_gradient(
    term: LinearTerm, block: Problem, start: int, operands: list[Tensor], grad_rows: Tensor, grad_columns: Tensor
) -> tuple[Tensor, ...]:
    """A linear term's gradient on one block, by differentiating the term's own formula there. Leaves of the
    accumulation dtype, so that nothing is rounded before the blocks are added."""
    dtype = block.accumulation_dtype
    x, y, scale = (operand.detach().to(dtype).requires_grad_() for operand in (block.x, block.y, block.scale))
    with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
        dots = term.dots(x, y, scale, start, operands)
        return torch.autograd.grad(dots, (x, y, scale), (grad_rows, grad_columns))
