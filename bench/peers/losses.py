"""The losses that are put side by side, each as its own users call it.

In both directions:

softclip_kernels         the hard loss
softclip_kernels PSD     half of the pairs taught by the model itself; nothing else here computes it
open_clip                ClipLoss
torch.compile            the dense loss in six lines of PyTorch, compiled for any size
checkpointed blocks      plain PyTorch: blocks of rows, whose logits torch.utils.checkpoint computes again
linear_cross_entropy     torch's own, once for each direction, with LinearCrossEntropyOptions() as it comes; without
                         options it is the dense loss
linear_cross_entropy/16  the same in 16 pieces at every size

In one direction, from rows that the loss brings to unit norm itself, with a scale that it does not learn:

softclip_kernels rows    what the adapter for sentence-transformers computes
MNRL, cached MNRL        of sentence-transformers, on given embeddings; the cached one in mini-batches of 256, with
                         which it is about three times as fast as with its default of 32
NTXentLoss               of pytorch-metric-learning, of two tensors; it compares all positives with all negatives
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softclip_kernels import softclip_loss
from softclip_kernels.testing import Result, Standard, dense_loss

from .. import installed, problems
from ..problems import SCALE, Case, Loss
from ..torchvision_beside_cpu import describe_torchvision

BLOCK = 1024  # rows of the checkpointed blocks
MINI_BATCH = 256  # of the cached MNRL


def _nothing() -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """A contender. Its functions are a module's, so that another process can be told of it.

    name      in rows and plots
    make      of a case: the loss, a function of (x, y, scale)
    loss      what it computes: "hard", "psd" or "rows", the hard loss in one direction
    host      the package that it comes from; None: torch and this repository
    why_not   None, or why it cannot be had although its host is there
    """

    name: str
    make: Callable[[Case], Loss]
    loss: str = "hard"
    host: str | None = None
    why_not: Callable[[], str | None] = _nothing

    def missing(self) -> str | None:
        return (self.host and installed.missing(self.host)) or self.why_not()

    def version(self) -> str | None:
        """Of its host."""
        if self.host is None or self.missing() is not None:
            return None
        return importlib.metadata.version(_distributions()[self.host][0])


@cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def with_unit_rows(loss: Loss) -> Loss:
    return lambda x, y, scale: loss(F.normalize(x, dim=1), F.normalize(y, dim=1), scale)


def fused(case: Case) -> Loss:
    """This library's, of any of the three."""
    if case.loss == "rows":
        return with_unit_rows(lambda x, y, scale: softclip_loss(x, y, scale, direction="rows"))
    return case.fused()


def dense(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale.to(x.dtype) * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def open_clip(case: Case) -> Loss:
    describe_torchvision()
    from open_clip.loss import ClipLoss

    return ClipLoss()


def compiled(case: Case) -> Loss:
    torch._inductor.config.compile_threads = 1  # a process that is killed leaves no others behind
    return torch.compile(dense, dynamic=True, fullgraph=True)


def checkpointed(case: Case) -> Loss:
    def summed(rows: Tensor, columns: Tensor, scale: Tensor, first: int) -> Tensor:
        labels = torch.arange(first, first + len(rows), device=rows.device)
        return F.cross_entropy(scale.to(rows.dtype) * rows @ columns.T, labels, reduction="sum")

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        total = scale.new_zeros(())
        for rows, columns in ((x, y), (y, x)):
            for first in range(0, len(rows), BLOCK):
                block = rows[first : first + BLOCK]
                total = total + checkpoint(summed, block, columns, scale, first, use_reentrant=False)
        return total / (2 * len(x))

    return loss


def linear_cross_entropy(case: Case) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        labels, scaled = torch.arange(len(x), device=x.device), scale.to(x.dtype) * x
        rows = F.linear_cross_entropy(scaled, y, labels, options=options)
        return (rows + F.linear_cross_entropy(y, scaled, labels, options=options)) / 2

    return loss


def linear_cross_entropy_in_pieces(case: Case) -> Loss:
    return problems.built_in


def ranking(case: Case) -> Loss:
    describe_torchvision()
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    module = MultipleNegativesRankingLoss(_no_model(), scale=SCALE)
    return lambda x, y, scale: module.compute_loss_from_embeddings([x, y], None)


def cached_ranking(case: Case) -> Loss:
    describe_torchvision()
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, which an ended process leaves behind
    module = CachedMultipleNegativesRankingLoss(_no_model(), scale=SCALE, mini_batch_size=MINI_BATCH)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        """It computes gradients in its forward pass, of embeddings in mini-batches; a hook gives them on later."""
        columns = [[part.requires_grad_() for part in rows.detach().split(MINI_BATCH)] for rows in (x, y)]
        value = module.calculate_loss(columns, with_backward=True)
        return _Cached.apply(value, x, y, *(torch.cat([part.grad for part in parts]) for parts in columns))

    return loss


class _Cached(torch.autograd.Function):
    """A loss whose gradients are there."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
        ctx.gradients = dx, dy
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient.mul_(upstream[0]) for gradient in ctx.gradients), None, None


def nt_xent(case: Case) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    module = NTXentLoss(temperature=1 / SCALE)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(len(x), device=x.device)
        return module(x, labels, ref_emb=y, ref_labels=labels.clone())

    return loss


PEERS = (
    Peer("softclip_kernels", fused),
    Peer("softclip_kernels PSD", fused, "psd"),
    Peer("open_clip", open_clip, host="open_clip"),
    Peer("torch.compile", compiled),
    Peer("checkpointed blocks", checkpointed),
    Peer("linear_cross_entropy", linear_cross_entropy, why_not=problems.why_no_built_in),
    Peer(f"linear_cross_entropy/{problems.PIECES}", linear_cross_entropy_in_pieces, why_not=problems.why_no_built_in),
    Peer("softclip_kernels rows", fused, "rows"),
    Peer("MNRL", ranking, "rows", "sentence_transformers"),
    Peer("cached MNRL", cached_ranking, "rows", "sentence_transformers"),
    Peer("NTXentLoss", nt_xent, "rows", "pytorch_metric_learning"),
)


def standard(loss: str, x: Tensor, y: Tensor, scale: Tensor) -> Standard:
    """The library's, on which a peer is judged. Where rows are brought to unit norm first, their gradient is exactly
    that; what is allowed is the same."""
    if loss != "rows":
        return Standard.of(x, y, scale, problems.target(loss, len(x), x.shape[1], x.dtype))
    found = Standard.of(x, y, scale, direction="rows")
    exact = with_unit_rows(lambda x, y, scale: dense_loss(x, y, scale, direction="rows"))
    return Standard(Result.of(exact, x.double(), y.double(), scale.double()), found.allowed)


def gradients(loss: Loss, operands: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The loss, and its gradients with respect to x, y and scale; None of what it does not depend on."""
    value = loss(*operands)
    return value, *torch.autograd.grad(value, tuple(operands), allow_unused=True)


def result(found: Sequence[Tensor | None], expected: Result) -> Result:
    """What `gradients` returned. Some peers know the scale as a number: of its gradient nothing is expected."""
    value, dx, dy, dscale = found
    if value is None or dx is None or dy is None:
        raise AssertionError("a gradient is missing: the loss does not depend on both of its operands")
    return Result(value.detach(), dx, dy, expected.dscale if dscale is None else dscale)


def _no_model() -> nn.Module:
    """In place of an encoder: the losses are called on embeddings."""
    return nn.Sequential(nn.Identity())
