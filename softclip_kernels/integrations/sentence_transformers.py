"""sentence-transformers' ranking losses, computed by softclip_loss. Everything else of the host stays as it is: the
columns and how they are encoded, its gradient cache, its trainer.

    loss = SoftClipMultipleNegativesRankingLoss(model)      # in the place of losses.MultipleNegativesRankingLoss(model)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
    from sentence_transformers.util import cos_sim
except ImportError as error:
    raise ImportError(
        f"softclip_kernels.integrations.sentence_transformers needs sentence-transformers 6 ({error}): "
        f"pip install softclip-kernels[integrations]"
    ) from error

from .. import backends
from ..distributed.exchange import WORLD
from ..losses.softmax import softclip_loss
from ..targets.base import Target, check_target
from ..targets.combine import Weighted
from ..targets.context import Context
from ..targets.hard import Hard
from ..targets.lowered import LoweredTarget
from . import hooks
from .hooks import Hook

_HOST = "sentence-transformers 6.2"
_LOSSES = "sentence_transformers.sentence_transformer.losses"
_FIRST = ("model", "scale", "similarity_fct")
_SHARED = ("gather_across_devices", "directions", "partition_mode")
_HARDNESS = ("hardness_mode", "hardness_strength")

HOOKS: tuple[Hook, ...] = (
    Hook(
        _HOST,
        f"{_LOSSES}:MultipleNegativesRankingLoss",
        (*_FIRST, *_SHARED, *_HARDNESS),
    ),
    Hook(
        _HOST,
        f"{_LOSSES}:MultipleNegativesRankingLoss.compute_loss_from_embeddings",
        ("embeddings", "labels"),
    ),
    Hook(
        _HOST,
        f"{_LOSSES}:CachedMultipleNegativesRankingLoss",
        (*_FIRST, "mini_batch_size", "mini_batch_num_tokens", *_SHARED, "show_progress_bar", *_HARDNESS),
    ),
    Hook(
        _HOST,
        f"{_LOSSES}:CachedMultipleNegativesRankingLoss.calculate_loss",
        ("reps", "labels", "*with_backward"),
    ),
)

ONE_WAY = {"query_to_doc"}
BOTH_WAYS = {"query_to_doc", "doc_to_query"}


class _Fused(nn.Module):
    """What both losses share: which of the host's options are covered, and the loss of a batch's columns."""

    # The host's options, which it may keep in another module of its own.
    scale: float
    similarity_fct: Any
    gather_across_devices: bool
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None

    def __init__(self, *arguments: Any, target: Target | None = None, backend: str = "auto", **options: Any) -> None:
        hooks.check(HOOKS)
        super().__init__(*arguments, **options)
        if target is not None:
            check_target("target", target)
        backends.check_name(backend)
        self.target, self.backend = target, backend
        self._check()

    def _check(self) -> None:
        """Also at every call, for the host lets its options be changed."""
        asked = set(self.directions)
        both = asked == BOTH_WAYS and self.partition_mode == "per_direction"
        refusal = None
        if self.similarity_fct is not cos_sim:
            name = getattr(self.similarity_fct, "__name__", type(self.similarity_fct).__name__)
            refusal = f"similarity_fct={name}; allowed: cos_sim"
        elif self.hardness_mode is not None:
            refusal = f"hardness_mode={self.hardness_mode!r}; allowed: None"
        elif asked != ONE_WAY and not both:
            refusal = (
                f"directions={tuple(self.directions)!r} with partition_mode={self.partition_mode!r}; allowed: "
                f"('query_to_doc',), or ('query_to_doc', 'doc_to_query') with partition_mode='per_direction'"
            )
        if refusal:
            # Its own class of the host, which has all of these.
            host = next(each for each in type(self).__mro__ if each.__module__.startswith("sentence_transformers."))
            raise ValueError(f"{type(self).__name__}: {refusal}. The host's {host.__name__} takes it")

    def _loss(self, columns: Sequence[Tensor]) -> Tensor:
        """columns: the embeddings (n, D) of anchors, positives and any number of columns of negatives, not yet of unit
        norm."""
        self._check()
        if len(columns) < 2:
            raise ValueError(f"{len(columns)} column; at least an anchor and a positive are needed")
        if self.target is not None and len(columns) > 2:
            raise ValueError(
                f"target= is for pairs, but the batch has {len(columns)} columns: drop the negatives, or the target"
            )
        queries, documents = F.normalize(columns[0], dim=1), F.normalize(torch.cat(list(columns[1:])), dim=1)
        # Positives stand before negatives. A rank's own are counted, for over ranks all of a rank's columns, negatives
        # included, stand together.
        own = torch.arange(len(queries), device=queries.device)
        target = self.target if self.target is not None and torch.is_grad_enabled() else Hard(own, local=True)
        both = set(self.directions) == BOTH_WAYS
        return softclip_loss(
            queries,
            documents,
            float(self.scale),
            PerQuery(target) if both else target,
            direction="both" if both else "rows",
            group=WORLD if self.gather_across_devices else None,
            backend=self.backend,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The host's, for its model cards."""
        config: dict[str, Any] = super().get_config_dict()  # type: ignore[misc]
        return config if self.target is None else {**config, "target": repr(self.target)}


class SoftClipMultipleNegativesRankingLoss(_Fused, MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss without its matrix of scores. The host's arguments, in its order, and

    target   of pairs, in place of the positive alone: EachStep(psd.at, lambda: trainer.state.global_step), for example.
             Evaluation, which has no gradients, keeps to the positive
    backend  as softclip_loss takes it

    One direction or both, any number of negatives; gather_across_devices=True contrasts the columns of all ranks, whose
    batches may differ in size. Other similarities than cos_sim, hardness, other directions and a joint softmax over two
    are refused with ValueError; a host of other signatures raises UnknownHost.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        return self._loss(embeddings)


class SoftClipCachedMultipleNegativesRankingLoss(_Fused, CachedMultipleNegativesRankingLoss):
    """CachedMultipleNegativesRankingLoss: the host's gradient cache around SoftClipMultipleNegativesRankingLoss, which
    says what is covered and what `target` and `backend` are."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        loss = self._loss([torch.cat(column) for column in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


@dataclass(frozen=True)
class PerQuery(Target):
    """Both directions, each a mean over the n queries: of the m documents, only the n positives have a loss. With
    negatives, a mean over all documents would count their direction n / m times."""

    target: Target

    def lower(self, context: Context) -> LoweredTarget:
        return Weighted(self.target, (1.0, context.layout.m / context.layout.n)).lower(context)
