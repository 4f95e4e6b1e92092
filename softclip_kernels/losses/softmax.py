"""The softmax contrastive loss, as functions; `module` has it as a module.

One call runs, in order: checks and the agreement between ranks (`agreement.make_layout`), the target's `lower` and
`complete`, and `autograd.LocalLossFunction`: `backends.select`, a kernel, the target's linear forms, the reduction.
Over ranks, traced, not reduced or with linear terms it is `autograd.loss_parts` (the custom operator,
`backends.select`, a kernel; over ranks, block by block), `CompletedTarget.losses`, the reduction.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from .. import autograd, backends, checks, guard_rails, ops, positives
from ..distributed import agreement, torch_private
from ..distributed.exchange import Layout, as_exchange
from ..precision import without_autocast
from ..problem import Problem
from ..targets.base import Target, check_target
from ..targets.context import Context
from ..targets.hard import Hard
from ..targets.lowered import CompletedTarget, LoweredTarget
from ..targets.terms import IndexTerm

if TYPE_CHECKING:
    from typing_extensions import Unpack

REDUCTIONS = ("mean", "sum", "none")
DIRECTIONS = ("both", "rows", "columns")


class Losses(NamedTuple):
    """reduction="none": rows (N,) image→text and columns (M,) text→image, this rank's own; (0,) of a direction that is
    not in the loss."""

    rows: Tensor
    columns: Tensor


class RetrievalRanks(NamedTuple):
    """How many logits exceed the positive's: rows (N,) among columns, columns (M,) among rows; int64, 0 is the best, -1
    for a column that is no row's positive. Ties count in favor, a positive that is NaN or infinite ranks last. This
    rank's own rows and columns."""

    rows: Tensor
    columns: Tensor

    def recall(self, k: int) -> tuple[Tensor, Tensor]:
        """R@k image→text and text→image: the share of positives among the k best, 0-d tensors."""
        rows, columns = self.rows < k, (self.columns < k)[self.columns >= 0]
        return rows.double().mean(), columns.double().mean()


class _Where(TypedDict, total=False):
    """Options of the loss that its result's type does not depend on."""

    direction: str
    group: Any
    backend: str


class Options(_Where, total=False):
    """Options of the loss beside its operands and its target; see softclip_loss."""

    reduction: str


@overload
def softclip_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    target: Target | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    **where: Unpack[_Where],
) -> Tensor: ...
@overload
def softclip_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    target: Target | None = None,
    *,
    reduction: Literal["none"],
    **where: Unpack[_Where],
) -> Losses: ...
@overload
def softclip_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor | float, target: Target | None = None, **options: Unpack[Options]
) -> Tensor | Losses: ...
def softclip_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    target: Target | None = None,
    *,
    reduction: str = "mean",
    direction: str = "both",
    group: Any = None,
    backend: str = "auto",
) -> Tensor | Losses:
    """Contrastive loss between x and y with hard, soft or mixed targets, without storing the similarity matrix.

        z = logit_scale * x @ y.T
        (F.cross_entropy(z, Y) + F.cross_entropy(z.T, Y_columns.T)) / 2              # Y of unit rows; eye for Hard()

    x            (N, D) image embeddings, float32, bfloat16, float16 or float64, normally of unit norm
    y            (M, D) text embeddings, same dtype and device
    logit_scale  already exponentiated: one element of any floating dtype, or a number
    target       Hard() (CLIP) by default; see softclip_kernels.targets
    reduction    "mean": half the mean over rows plus half the mean over columns; "sum": the same with sums;
                 "none": Losses(rows, columns)
    direction    "both"; "rows": the rows' losses alone, F.cross_entropy(z, Y), neither halved nor joined by the
                 columns' (a query's loss over documents, InfoNCE in one direction); "columns": the columns' alone
    group        a torch.distributed process group, "world" (the default one, looked up at each call; none in a job of
                 one process), or an Exchange around either: x and y are this rank's shares, every rank's pairs are
                 contrasted, and the mean over ranks of the returned losses is the loss of the whole batch. Every rank
                 calls the loss, with targets of one kind; an error on one is an error on all
    backend      "auto", or one of softclip_kernels.backends.registered(); one asked for that cannot run raises

    Returns a 0-d tensor of the accumulation dtype (float64 for float64, else float32), or Losses of that dtype.
    Gradients reach x, y and logit_scale; one that does not require a gradient costs no matrix product. The operands'
    dtype says how to compute, also under autocast; only where it is on and x and y have two, both take autocast's. A
    zero embedding is legal (its logits are 0); NaN and infinity in a tensor, the scale included, come back as a
    non-finite loss; a scale of 0 or less is refused on the CPU and as a number. Raises TypeError or ValueError on
    operands that do not fit, RuntimeError for a backend. A WiringWarning, once a process, names what is legal and yet
    most likely not meant.
    """
    request = Request(x, y, logit_scale, target, reduction, group, backends.current_name(backend), direction)
    return run(request)[0]


@overload
def softclip_loss_with_ranks(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    target: Target | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    **where: Unpack[_Where],
) -> tuple[Tensor, RetrievalRanks]: ...
@overload
def softclip_loss_with_ranks(
    x: Tensor, y: Tensor, logit_scale: Tensor | float, target: Target | None = None, **options: Unpack[Options]
) -> tuple[Tensor | Losses, RetrievalRanks]: ...
def softclip_loss_with_ranks(
    x: Tensor, y: Tensor, logit_scale: Tensor | float, target: Target | None = None, **options: Any
) -> tuple[Any, RetrievalRanks]:
    """softclip_loss, with its options, and from the same pass over the similarities the ranks of the positives. The
    target's hard part must be Hard() or Hard(labels): something with one positive a row. Ranks are of rows and columns,
    whatever the loss's direction."""
    options["backend"] = backends.current_name(options.get("backend", "auto"))
    request = Request(x, y, logit_scale, target, **options, ranked=True)
    loss, ranks = run(request)
    return loss, ranks


@dataclass(frozen=True)
class Request:
    """One call of the loss: the arguments of softclip_loss, and whether retrieval ranks are asked for."""

    x: Tensor
    y: Tensor
    logit_scale: Tensor | float
    target: Target | None = None
    reduction: str = "mean"
    group: Any = None
    backend: str = "auto"
    direction: str = "both"
    ranked: bool = False

    def check(self) -> None:
        checks.one_of("reduction", self.reduction, REDUCTIONS)
        checks.one_of("direction", self.direction, DIRECTIONS)
        backends.check_name(self.backend)
        checks.embeddings(self.x, self.y)
        self.check_values()

    def check_values(self) -> None:
        """What may be wrong where a call of the same shapes was right."""
        if self.target is not None:
            check_target("target", self.target)
        checks.logit_scale(self.logit_scale, self.x.device)
        if self.learns:
            guard_rails.alone(self.group)
            guard_rails.operands(self.x, self.y, self.logit_scale)

    @property
    def learns(self) -> bool:
        scale = self.logit_scale
        of_scale = isinstance(scale, Tensor) and scale.requires_grad
        return torch.is_grad_enabled() and (of_scale or self.x.requires_grad or self.y.requires_grad)

    def lower(self, context: Context) -> LoweredTarget:
        lowered = (Hard() if self.target is None else self.target).lower(context)
        of_two_means = self.direction == "both" and self.reduction == "mean" and lowered.row_weight is None
        if self.learns and of_two_means and not lowered.teachers:
            guard_rails.rectangle(context.layout.n, context.layout.m)
        if self.ranked and (lowered.positive is None or any(isinstance(term, IndexTerm) for term in lowered.linear)):
            raise ValueError(f"retrieval ranks need one positive a row: one Hard() or Hard(labels), not {self.target}")
        return lowered

    def describe(self, lowered: LoweredTarget) -> str:
        """What every rank's request must have in common, beyond its operands' shapes."""
        wanted = ["ranks"] * self.ranked + ["gradients"] * self.learns
        options = f"reduction={self.reduction!r}, direction={self.direction!r}"
        return f"{lowered.structure()}, {' and '.join(wanted) or 'nothing'} wanted, {options}"


def _of_one_dtype(request: Request) -> Request:
    """Where autocast is on, x and y of two dtypes take autocast's, as the operands of a matrix product would."""
    x, y = request.x, request.y
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.dtype == y.dtype or x.device != y.device:
        return request
    kind = x.device.type
    castable = {x.dtype, y.dtype} <= {torch.float32, torch.float16, torch.bfloat16}
    if not (castable and torch.is_autocast_enabled(kind)):
        return request
    dtype = torch.get_autocast_dtype(kind)
    return replace(request, x=x.to(dtype), y=y.to(dtype))


def _full_precision(x: Any) -> AbstractContextManager[Any]:
    """No autocast in here: the operands' own dtypes say how to compute."""
    return without_autocast(x.device.type) if isinstance(x, Tensor) else nullcontext()


def run(request: Request) -> tuple[Any, Any]:
    """The loss, and RetrievalRanks where they are asked for."""
    request = _of_one_dtype(request)
    if torch.compiler.is_compiling() and (exchange := as_exchange(request.group)) is not None:
        if not torch_private.IN_GRAPHS:
            return torch.compiler.disable(run)(request)
        from . import graph  # which imports the compiler

        return graph.run_in_graph(request, exchange)
    with _full_precision(request.x):
        problem, target, layout = _prepare(request)
        if request.ranked:
            assert target.lowered.positive is not None
            problem = positives.with_thresholds(problem, target.lowered.positive.own, layout)
        loss, ranks = _loss(problem, target, request, layout)
        return loss, None if ranks is None else _retrieval_ranks(problem, *ranks, layout)


def _loss(
    problem: Problem, target: CompletedTarget, request: Request, layout: Layout
) -> tuple[Tensor | Losses, tuple[Tensor, Tensor] | None]:
    """The loss, and where they are asked for the row and column ranks of Statistics."""
    shares = _shares(request, layout)
    traced = torch.compiler.is_compiling()
    if shares is not None and layout.exchange is None and not target.linear and not traced:
        positive = target.lowered.positive
        local = autograd.LocalLoss(
            known_forms=target.known_forms(request.direction),
            forms=lambda statistics: target.forms(statistics, request.direction),
            losses=lambda forms, parts: target.losses(forms, parts, layout),
            shares=shares,
            diagonal=positive is not None and positive.diagonal,
            learns=request.learns,
            backend=request.backend,
        )
        result = autograd.LocalLossFunction.apply(problem.x, problem.y, problem.scale, problem, local)
        return (result[0], result[1:]) if request.ranked else (result, None)
    parts = autograd.loss_parts(problem, target.linear_terms(), layout, request.backend)
    ranks = (parts.statistics.row_ranks, parts.statistics.column_ranks) if request.ranked else None
    rows, columns = target.losses(target.forms(parts.statistics, request.direction), parts, layout)
    if shares is not None:
        return autograd.reduced(rows, columns, shares), ranks
    nothing = parts.statistics.positive_logit.new_empty(0)
    return Losses(*(nothing if each is None else each for each in (rows, columns))), ranks


def _prepare(request: Request) -> tuple[Problem, CompletedTarget, Layout]:
    """Everything before the first pass over the similarities. Over ranks, whatever may raise does so before any of them
    waits for another."""
    x, y, exchange = request.x, request.y, as_exchange(request.group)
    known = _known_of(request)
    if known.layout is not None:
        layout = known.layout
        request.check_values()
    else:
        layout = agreement.make_layout(x, y, exchange, request.check)
        checks.not_empty(layout.n, layout.m)
        known.layout = layout
    scale = _as_scale(request.logit_scale, layout)
    diagonal = request.target is None or (type(request.target) is Hard and request.target.is_diagonal)
    if diagonal and known.diagonal is not None:
        return known.diagonal.lowered.problem(x, y, scale), known.diagonal, layout
    context = Context((x, y, scale), layout, request.backend, request.direction, kept=known.kept)

    def lower() -> LoweredTarget:
        lowered = request.lower(context)
        if exchange is not None:  # what this rank's backend would refuse in the middle of an exchange
            backends.select(request.backend, lowered.problem(x, y, scale))
        return lowered

    lowered = agreement.agree_on_text(exchange, "agreement on targets", lower, request.describe)
    if exchange is not None:
        layout = agreement.decide_plan(lowered.problem(x, y, scale), layout)
        context = replace(context, layout=layout)
    target = lowered.complete(context)
    if diagonal:
        known.diagonal = target
    return target.lowered.problem(x, y, scale), target, layout


@dataclass
class _Known:
    """What follows from the shapes of a call alone, once it is known: the layout of operands in which nothing is wrong,
    CLIP's own target, and what else targets keep. `kept` is None where nothing is."""

    layout: Layout | None = None
    diagonal: CompletedTarget | None = None
    kept: dict[str, Tensor] | None = None


# By what the shapes are, of so few rows that a call takes as long to prepare as to compute.
SMALL, MOST_KNOWN = {"cpu": 4096, "cuda": 16384}, 16
_by_shapes: dict[Any, _Known] = {}


def _known_of(request: Request) -> _Known:
    """What is known from calls of the same shapes, and is to be filled; of one process, where nothing watches."""
    x, y = request.x, request.y
    if request.group is not None or ops.watched(x) or ops.watched(y) or x.dim() != 2:
        return _Known()
    kind = x.device.type
    if len(x) > SMALL.get(kind, -1) or (kind == "cuda" and torch.cuda.is_current_stream_capturing()):
        return _Known()  # a graph's memory is filled when it is replayed, and not kept for it
    # Nobody but a stream waits for what it computes: each has tensors of its own.
    stream = torch.cuda.current_stream(x.device).cuda_stream if kind == "cuda" else 0
    operands = x.shape, y.shape, x.dtype, y.dtype, x.device, y.device, stream, x.layout, y.layout
    key = *operands, request.reduction, request.direction, request.backend, torch.is_inference_mode_enabled()
    try:
        known = _by_shapes.get(key)
    except TypeError:  # an option that is no string: the checks say what is wrong with it
        return _Known()
    if known is None:
        if len(_by_shapes) >= MOST_KNOWN:
            _by_shapes.clear()
        known = _by_shapes[key] = _Known(kept={})
    return known


def _as_scale(value: Tensor | float, layout: Layout) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=layout.dtype, device=layout.device)
    if value.dim() == 0 and value.dtype == layout.dtype and value.device == layout.device:
        return value
    return value.to(device=layout.device, dtype=layout.dtype).reshape(())


def _shares(request: Request, layout: Layout) -> tuple[float, float] | None:
    """What a row's and what a column's loss count in the reduced loss, 0 of a direction that is not in it; None where
    it is not reduced."""
    if request.reduction == "none":
        return None
    n, m = (1, 1) if request.reduction == "sum" else (layout.n, layout.m)
    rows, columns = {"both": (0.5, 0.5), "rows": (1.0, 0.0), "columns": (0.0, 1.0)}[request.direction]
    return rows * layout.world_size / n, columns * layout.world_size / m


def _retrieval_ranks(problem: Problem, row_ranks: Tensor, column_ranks: Tensor, layout: Layout) -> RetrievalRanks:
    assert problem.row_threshold is not None and problem.column_threshold is not None
    # Nothing exceeds NaN or infinity: behind all others, not before them. (-inf: a column that is no row's positive.)
    rows = torch.where(problem.row_threshold.isfinite(), row_ranks, layout.m)
    columns = torch.where(problem.column_threshold < torch.inf, column_ranks, layout.n)
    return RetrievalRanks(rows, torch.where(problem.column_threshold == -torch.inf, -1, columns))
