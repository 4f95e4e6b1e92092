"""The differentiable statistics of a similarity matrix that is never stored.

    z          = scale * x @ y.T
    rows       = z.logsumexp(1), and for each teacher  (q.softmax(1) * z).sum(1)   with q the teacher's logits, constant
    columns    = the same over rows
    positive   = z[i, positive[i]]
    dots       = for each linear term with its matrix E,  (E * z).sum(1)  and  (E * z).sum(0)

Every loss of the library is a linear function of these, so targets, weights and reductions are PyTorch outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, sharded
from .layout import Layout
from .problem import LinearTerm, LossParts, Problem, Statistics


def loss_parts(problem: Problem, terms: Sequence[LinearTerm], layout: Layout, backend: str = "auto") -> LossParts:
    """Differentiable with respect to the problem's `x`, `y` and `scale` through each student log-sum-exp, each
    teacher's mean logit, the positive's logit and the dots. Teachers, their log-sum-exps and ranks carry no gradient.
    The problem holds this rank's rows and this rank's columns; positives are global column numbers."""
    if layout.exchange is not None:
        return sharded.loss_parts(problem, terms, layout, backend)
    if not terms:
        return LossParts(statistics(problem, problem.x, problem.y, backend), (), ())
    # The gradients of hard and soft terms cancel as training converges, so 16-bit ones must be added before they are
    # rounded: all of them go to one wide copy of the embeddings, which the terms compute with.
    dtype = problem.accumulation_dtype
    x, y = problem.x.to(dtype), problem.y.to(dtype)
    dots = [term.dots(x, y, problem.scale, 0, term.column_operands()) for term in terms]
    found = statistics(problem, x, y, backend)
    return LossParts(found, tuple(row for row, _ in dots), tuple(column for _, column in dots))


def statistics(problem: Problem, x: Tensor, y: Tensor, backend: str = "auto") -> Statistics:
    """The Statistics of one rank's problem, differentiable with respect to x and y: the problem's own, or their copies
    in the accumulation dtype, which then get unrounded gradients."""
    (own_x, own_y, scale, *optional, operands), sources = ops.pack(problem)
    return Statistics(
        *_SoftClipStatistics.apply(
            x, y, scale, own_x.detach(), own_y.detach(), backend, tuple(sources), *optional, *operands
        )
    )


class _SoftClipStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        wide_x: Tensor,
        wide_y: Tensor,
        scale: Tensor,
        x: Tensor,
        y: Tensor,
        backend: str,
        sources: tuple[int, ...],
        positive: Tensor | None,
        row_segment: Tensor | None,
        column_segment: Tensor | None,
        row_threshold: Tensor | None,
        column_threshold: Tensor | None,
        *operands: Tensor | None,
    ) -> tuple[Tensor, ...]:
        result = ops.forward(
            x,
            y,
            scale,
            positive,
            row_segment,
            column_segment,
            row_threshold,
            column_threshold,
            list(operands),
            list(sources),
            backend,
        )
        rows, columns, positive_logit, row_ranks, column_ranks = result
        ctx.backend, ctx.sources, ctx.rounded = backend, sources, wide_x.dtype == x.dtype
        ctx.save_for_backward(
            wide_x, wide_y, x, y, scale, positive, row_segment, column_segment, rows, columns, positive_logit, *operands
        )
        ctx.mark_non_differentiable(row_ranks, column_ranks)
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wide_x, wide_y, x, y, scale, positive, row_segment, column_segment, *saved = ctx.saved_tensors
        rows, columns, positive_logit, *operands = saved
        grad_rows, grad_columns, grad_positive = gradients[:3]
        with torch.no_grad():
            found = ops.backward(
                x,
                y,
                scale,
                positive,
                row_segment,
                column_segment,
                operands,
                list(ctx.sources),
                ctx.backend,
                rows,
                columns,
                positive_logit,
                grad_rows[0::2].contiguous(),  # the teachers' log-sum-exps, at odd positions, are constants
                grad_columns[0::2].contiguous(),
                grad_positive,
                ctx.rounded,
            )
        dx, dy, dscale = ops.without_graph(found, (wide_x, wide_y, scale))
        return dx, dy, dscale, *(None for _ in range(9 + len(operands)))
