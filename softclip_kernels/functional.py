"""The loss as a function. One call runs, in order: checks, agreement.make_layout, the target's lower and complete,
autograd.loss_parts (ops, backends.select, a kernel; over ranks, block by block), LoweredTarget.losses, reduction."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import agreement, autograd, backends, checks, distributed
from .layout import Layout
from .lowering import IndexTerm, LoweredTarget, positive_logits
from .problem import Problem, Statistics
from .targets import Context, Hard, Target, check_target

REDUCTIONS = ("mean", "sum", "none")


class Losses(NamedTuple):
    """reduction="none": rows (N,) image→text and columns (M,) text→image, this rank's own."""

    rows: Tensor
    columns: Tensor


class RetrievalRanks(NamedTuple):
    """How many logits exceed the positive's: rows (N,) among columns, columns (M,) among rows; int64, 0 is the best, -1
    for a column that is no row's positive. Ties count in favour, a positive that is NaN or infinite ranks last. This
    rank's own rows and columns."""

    rows: Tensor
    columns: Tensor

    def recall(self, k: int) -> tuple[Tensor, Tensor]:
        """R@k image→text and text→image: the share of positives among the k best, 0-d tensors."""
        rows, columns = self.rows < k, (self.columns < k)[self.columns >= 0]
        return rows.double().mean(), columns.double().mean()


def softclip_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    target: Target | None = None,
    *,
    reduction: str = "mean",
    group: Any = None,
    backend: str = "auto",
) -> Tensor | Losses:
    """Contrastive loss between x and y with hard, soft or mixed targets, without storing the similarity matrix.

        z = logit_scale * x @ y.T
        (F.cross_entropy(z, Y) + F.cross_entropy(z.T, Y_columns.T)) / 2              # Y of unit rows; eye for Hard()

    x            (N, D) image embeddings, float32, bfloat16, float16 or float64, normally of unit norm
    y            (M, D) text embeddings, same dtype and device
    logit_scale  one element, already exponentiated, any floating dtype
    target       Hard() (CLIP) by default; see softclip_kernels.targets, .teachers and .psd
    reduction    "mean": half the mean over rows plus half the mean over columns; "sum": the same with sums;
                 "none": Losses(rows, columns)
    group        a torch.distributed process group, or an Exchange around one: x and y are this rank's shares, every
                 rank's pairs are contrasted, and the mean over ranks of the returned losses is the loss of the whole
                 batch. Every rank calls the loss, with targets of one kind; an error on one is an error on all
    backend      "auto", or one of softclip_kernels.backends.registered(); one asked for that cannot run raises

    Returns a 0-d tensor of the accumulation dtype (float64 for float64, else float32), or Losses of that dtype.
    Gradients reach x, y and logit_scale. A zero embedding is legal (its logits are 0); NaN and infinity in an operand,
    the scale included, come back as a non-finite loss; a scale of 0 or less is refused on the CPU. Raises TypeError or
    ValueError on operands that do not fit, RuntimeError for a backend.
    """
    return _outside_graphs(_loss, group)(x, y, logit_scale, target, reduction, group, backend)


def _loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, target: Target | None, reduction: str, group: Any, backend: str
) -> Tensor | Losses:
    with _full_precision(x):
        problem, lowered, layout = _prepare(x, y, logit_scale, target, reduction, group, backend, ranked=False)
        parts = autograd.loss_parts(problem, lowered.linear, layout, backend)
        return _reduce(lowered.losses(parts, layout), reduction, layout)


def softclip_loss_with_ranks(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    target: Target | None = None,
    *,
    reduction: str = "mean",
    group: Any = None,
    backend: str = "auto",
) -> tuple[Tensor | Losses, RetrievalRanks]:
    """softclip_loss and, from the same pass over the similarities, the ranks of the positives. The target's hard part
    must be Hard() or Hard(labels): something with one positive a row."""
    return _outside_graphs(_loss_with_ranks, group)(x, y, logit_scale, target, reduction, group, backend)


def _loss_with_ranks(
    x: Tensor, y: Tensor, logit_scale: Tensor, target: Target | None, reduction: str, group: Any, backend: str
) -> tuple[Tensor | Losses, RetrievalRanks]:
    with _full_precision(x):
        problem, lowered, layout = _prepare(x, y, logit_scale, target, reduction, group, backend, ranked=True)
        if lowered.indexed is None or any(isinstance(term, IndexTerm) for term in lowered.linear):
            raise ValueError(f"retrieval ranks need one positive a row: one Hard() or Hard(labels), not {target}")
        problem = _with_thresholds(problem, lowered.indexed, layout)
        parts = autograd.loss_parts(problem, lowered.linear, layout, backend)
        loss = _reduce(lowered.losses(parts, layout), reduction, layout)
        return loss, _ranks(problem, parts.statistics, layout)


def _outside_graphs(function: Callable[..., Any], group: Any) -> Callable[..., Any]:
    """The function as torch.compile shall see it: an exchange between ranks is not for a graph, so it breaks there."""
    if torch.compiler.is_compiling() and agreement.as_exchange(group) is not None:
        return torch.compiler.disable(function)
    return function


def _full_precision(x: Any) -> AbstractContextManager[Any]:
    """No autocast in here: the operands' own dtypes say how to compute."""
    return torch.autocast(x.device.type, enabled=False) if isinstance(x, Tensor) else nullcontext()


def _prepare(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    target: Target | None,
    reduction: str,
    group: Any,
    backend: str,
    ranked: bool,
) -> tuple[Problem, LoweredTarget, Layout]:
    def check() -> None:
        checks.one_of("reduction", reduction, REDUCTIONS)
        backends.canonical(backend)
        checks.embeddings(x, y)
        if target is not None:
            check_target("target", target)
        checks.logit_scale(logit_scale, x.device)

    exchange = agreement.as_exchange(group)
    layout = agreement.make_layout(x, y, exchange, check)
    checks.not_empty(layout.n, layout.m)
    scale = logit_scale.to(device=x.device, dtype=layout.dtype).reshape(())
    context = Context(x.detach(), y.detach(), scale.detach(), layout, backend)

    def lower() -> LoweredTarget:
        lowered = (Hard() if target is None else target).lower(context)
        if exchange is not None:  # what this rank's backend would refuse in the middle of an exchange
            backends.select(backend, lowered.problem(x, y, scale))
        return lowered

    def describe(lowered: LoweredTarget) -> str:
        learning = torch.is_grad_enabled() and any(operand.requires_grad for operand in (x, y, scale))
        given = ["ranks"] * ranked + ["gradients"] * learning
        return f"{lowered.structure()}, {' and '.join(given) or 'nothing'} wanted, reduction={reduction!r}"

    lowered = agreement.agree_on_text(exchange, "agreement on targets", lower, describe)
    layout = agreement.decide_plan(lowered.problem(x, y, scale), layout)
    lowered = lowered.complete(replace(context, layout=layout))
    return lowered.problem(x, y, scale), lowered, layout


def _reduce(losses: tuple[Tensor, Tensor], reduction: str, layout: Layout) -> Tensor | Losses:
    rows, columns = losses
    if reduction == "none":
        return Losses(rows, columns)
    if reduction == "sum":
        return 0.5 * layout.world_size * (rows.sum() + columns.sum())
    return 0.5 * layout.world_size * (rows.sum() / layout.n + columns.sum() / layout.m)


def _with_thresholds(problem: Problem, indexed: IndexTerm, layout: Layout) -> Problem:
    """A logit must exceed the positive's by more than rounding, so that equal embeddings tie and no positive exceeds
    itself where a kernel sums in another order: the rounding of a dot product of D terms grows as sqrt(D)."""
    positive, size = positive_logits(problem, indexed.own, layout)
    eps = torch.finfo(positive.dtype).eps
    row_threshold = positive + (4 + problem.x.shape[1] ** 0.5) * eps * size
    column_threshold = distributed.max_to_columns(row_threshold, indexed.index, layout)
    return replace(problem, row_threshold=row_threshold, column_threshold=column_threshold)


def _ranks(problem: Problem, statistics: Statistics, layout: Layout) -> RetrievalRanks:
    assert problem.row_threshold is not None and problem.column_threshold is not None
    # Nothing exceeds NaN or infinity: behind all others, not before them. (-inf: a column that is no row's positive.)
    rows = torch.where(problem.row_threshold.isfinite(), statistics.row_ranks, layout.m)
    columns = torch.where(problem.column_threshold < torch.inf, statistics.column_ranks, layout.n)
    return RetrievalRanks(rows, torch.where(problem.column_threshold == -torch.inf, -1, columns))
