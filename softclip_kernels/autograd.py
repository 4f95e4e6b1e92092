"""The differentiable statistics of a similarity matrix that is never stored, and the losses that are linear in them.

    z          = scale * x @ y.T
    rows       = z.logsumexp(1), and for each teacher  (q.softmax(1) * z).sum(1)   with q the teacher's logits, constant
    columns    = the same over rows
    positive   = z[i, positive_column[i]]
    dots       = for each linear term with its matrix E,  (E * z).sum(1)  and  (E * z).sum(0)

Every loss of the library is a linear function of these (linear_form.py), so targets, weights and reductions are PyTorch
outside of the kernels: `loss_parts` returns them. Where nothing is exchanged or traced and there are no linear terms,
`LocalLossFunction` has the statistics, the linear forms and the reduction in one node of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, ops
from .distributed import sharded
from .distributed.exchange import Layout
from .linear_form import LinearForms, ReducedGradient
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


class LocalLoss(NamedTuple):
    """A reduced loss of one process, without linear terms.

    known_forms  the losses as linear forms of the statistics, whose dots are the positives', where there are any; None
                 where they depend on the statistics
    forms     the same, from the statistics
    losses    row losses (N,) and column losses (M,) of these forms, None for a direction that is not in the loss
    shares    what a row's and what a column's loss count in the reduced loss; 0 of a direction that is not in it
    diagonal  whether row i's positive is column i, for all of them
    learns    whether a backward pass may follow
    backend   one of backends.registered(), or "auto"
    """

    known_forms: LinearForms | None
    forms: Callable[[Statistics], LinearForms]
    losses: Callable[[LinearForms, LossParts], tuple[Tensor | None, Tensor | None]]
    shares: tuple[float, float]
    diagonal: bool
    learns: bool
    backend: str


def reduced(rows: Tensor | None, columns: Tensor | None, shares: tuple[float, float]) -> Tensor:
    """The sum of row losses and column losses times their shares; one that is None is not in it."""
    if rows is None or columns is None:
        losses, share = (rows, shares[0]) if rows is not None else (columns, shares[1])
        assert losses is not None
        return losses.sum() * share
    if shares[0] == shares[1]:
        return (rows.sum() + columns.sum()) * shares[0]
    return rows.sum() * shares[0] + columns.sum() * shares[1]


def _reduced(
    problem: Problem, statistics: Statistics, forms: LinearForms, local: LocalLoss, backend: backends.Backend | None
) -> Tensor:
    """The backend's own where it has one."""
    reduce = getattr(backend, "reduced", None)
    loss = None if reduce is None else reduce(problem, statistics, forms, local.shares)
    if loss is None:
        rows, columns = local.losses(forms, LossParts(statistics, (), ()))
        loss = reduced(rows, columns, local.shares)
    return loss


class LocalLossFunction(torch.autograd.Function):
    """The loss, 0-d, differentiable with respect to the problem's x, y and scale, and where ranks are counted,
    Statistics' row and column ranks, which are not. Statistics, linear forms and reduction are one node of the graph: a
    dozen nodes would cost a small batch more than its kernels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, problem: Problem, local: LocalLoss
    ) -> Tensor | tuple[Tensor, ...]:
        backend = ops.unwatched(problem, local.backend)
        forms, at_once = local.known_forms, getattr(backend, "forward_and_loss", None)
        computed = None if forms is None or at_once is None else at_once(problem, forms, local.shares)
        if forms is not None and computed is not None:
            statistics, loss = computed
        else:
            statistics = (
                ops.statistics_of(problem, local.backend) if backend is None else backend.forward(problem, local.learns)
            )
            if forms is None:
                forms = local.forms(statistics)
            loss = _reduced(problem, statistics, forms, local, backend)
        coefficients, ctx.forms = forms.kept()
        known = (statistics.rows.packed, statistics.columns.packed, statistics.positive_logit, statistics.scalars)
        tensors, ctx.sources = problem.tensors(), problem.sources()
        ctx.save_for_backward(*tensors, *known, statistics.kept, *coefficients)
        ctx.problem_tensors, ctx.ranks = len(tensors), (statistics.row_ranks, statistics.column_ranks)
        ctx.shares, ctx.diagonal, ctx.backend = local.shares, local.diagonal, backend or local.backend
        if problem.row_threshold is None:
            return loss
        ctx.set_materialize_grads(False)  # of the ranks
        ctx.mark_non_differentiable(statistics.row_ranks, statistics.column_ranks)
        return loss, statistics.row_ranks, statistics.column_ranks

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 5
        tensors, saved = ctx.saved_tensors[: ctx.problem_tensors], ctx.saved_tensors[ctx.problem_tensors :]
        problem, forms = Problem.of(tensors, ctx.sources), ctx.forms(saved[5:])
        rows, columns, positive_logit, scalars, kept = saved[:5]
        row_ranks, column_ranks = ctx.ranks
        statistics = Statistics.of(rows, columns, positive_logit, row_ranks, column_ranks, scalars, kept)
        with torch.no_grad():
            incoming = ReducedGradient(forms, ctx.shares, ctx.diagonal, gradient)
            given = ops.gradients_of(problem, statistics, incoming, ctx.needs_input_grad[:3], ctx.backend)
        return *ops.without_graph(given, tensors[:3]), None, None
