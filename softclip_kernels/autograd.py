"""The differentiable statistics of a similarity matrix that is never stored.

    z          = scale * x @ y.T
    rows       = z.logsumexp(1), and for each teacher  (q.softmax(1) * z).sum(1)   with q the teacher's logits, constant
    columns    = the same over rows
    positive   = z[i, positive_column[i]]
    dots       = for each linear term with its matrix E,  (E * z).sum(1)  and  (E * z).sum(0)

Every loss of the library is a linear function of these, so targets, weights and reductions are PyTorch outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .distributed import sharded
from .distributed.exchange import Layout
from .problem import Problem
from .stats import ColumnBlock, LinearTerm, LossParts, Statistics, StatisticsGradient


def loss_parts(problem: Problem, terms: Sequence[LinearTerm], layout: Layout, backend: str = "auto") -> LossParts:
    """Differentiable with respect to the problem's `x`, `y` and `scale` through each student log-sum-exp, each
    teacher's mean logit, the positive's logit and the dots. Teachers, their log-sum-exps and ranks carry no gradient.
    The problem holds this rank's rows and this rank's columns; positives are global column numbers."""
    if layout.exchange is not None:
        return sharded.loss_parts(problem, terms, layout, backend)
    x, y, scale = problem.x, problem.y, problem.scale
    if terms:
        # The gradients of hard and soft terms cancel as training converges, so 16-bit ones must be added before they
        # are rounded: all of them go to one wide copy of the embeddings, which the terms compute with.
        x, y = x.to(problem.accumulation_dtype), y.to(problem.accumulation_dtype)
    dots = [term.dots(x, ColumnBlock(y, 0, term.column_operands()), scale) for term in terms]
    constants = [tensor if tensor is None else tensor.detach() for tensor in problem.tensors()]
    statistics = SoftmaxStatisticsFunction.apply(x, y, scale, backend, tuple(problem.sources()), *constants)
    return LossParts(Statistics.of(*statistics), tuple(row for row, _ in dots), tuple(column for _, column in dots))


class SoftmaxStatisticsFunction(torch.autograd.Function):
    """Statistics of the problem in `tensors`. x and y are the problem's own, or copies in the accumulation dtype, which
    then get gradients that are not rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        backend: str,
        sources: tuple[int, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        result = ops.forward(*ops.pack(tensors, sources), backend)
        ctx.backend, ctx.sources, ctx.problem_tensors = backend, sources, len(tensors)
        *differentiable, row_ranks, column_ranks, scalars = result
        ctx.save_for_backward(x, y, scale, *tensors, *differentiable, scalars)
        ctx.mark_non_differentiable(row_ranks, column_ranks)
        return tuple(result[:5])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, *saved = ctx.saved_tensors
        tensors, statistics = saved[: ctx.problem_tensors], saved[ctx.problem_tensors :]
        needed = list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            results = ops.backward(
                *ops.pack(tensors, ctx.sources),
                ctx.backend,
                *statistics,
                *StatisticsGradient.of(*gradients[:3]),
                [*needed, x.dtype == tensors[0].dtype],
            )
        given = [result if needs else None for result, needs in zip(results, needed, strict=True)]
        return *ops.without_graph(given, (x, y, scale)), None, None, *(None for _ in tensors)
