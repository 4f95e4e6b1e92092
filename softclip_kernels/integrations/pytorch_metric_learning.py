"""pytorch-metric-learning's NTXentLoss and SupConLoss between two tensors, without their matrices of pairs.

loss = SoftClipNTXentLoss(temperature=0.07)      # in the place of losses.NTXentLoss(temperature=0.07)
loss(images, labels, ref_emb=texts, ref_labels=labels.clone())
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
except ImportError as error:
    raise ImportError(
        f"softclip_kernels.integrations.pytorch_metric_learning needs pytorch-metric-learning 2.9 ({error}): "
        f"pip install softclip-kernels[integrations]"
    ) from error

from .. import backends
from ..losses.softmax import softclip_loss
from ..targets.base import Target
from ..targets.hard import Hard
from . import hooks
from .hooks import Hook

_HOST = "pytorch-metric-learning 2.9"
_LOSSES = "pytorch_metric_learning.losses"
_OPERANDS = ("embeddings", "labels", "indices_tuple", "ref_emb", "ref_labels")

HOOKS: tuple[Hook, ...] = (
    Hook(_HOST, f"{_LOSSES}:NTXentLoss", ("temperature", "**kwargs")),
    Hook(_HOST, f"{_LOSSES}:NTXentLoss.compute_loss", _OPERANDS),
    Hook(_HOST, f"{_LOSSES}:SupConLoss", ("temperature", "**kwargs")),
    Hook(_HOST, f"{_LOSSES}:SupConLoss.compute_loss", _OPERANDS),
)


class _TwoTensors:
    """What both losses share: which of the host's options and operands are covered, and every row's loss. The host
    reduces them, so that its reducers and regularizers are what they were."""

    temperature: float
    distance: Any

    def __init__(self, *arguments: Any, backend: str = "auto", **options: Any) -> None:
        hooks.check(HOOKS)
        super().__init__(*arguments, **options)
        backends.check_name(backend)
        self.backend = backend
        distance = self.distance
        if type(distance) is not CosineSimilarity or (distance.p, distance.power) != (2, 1):
            raise ValueError(
                f"{type(self).__name__}: distance={type(distance).__name__}(p={distance.p}, power={distance.power}); "
                f"allowed: CosineSimilarity(). The host's own loss takes others"
            )

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        """The host's, of operands that are covered."""
        name = type(self).__name__
        if indices_tuple is not None:
            raise ValueError(
                f"{name}: indices_tuple chooses pairs, as miners and CrossBatchMemory do, and this loss contrasts all "
                f"of them; allowed: None. The host's own loss takes one"
            )
        if labels is None:
            raise ValueError(f"{name}: labels=None; allowed: integers (N,), with ref_labels (M,)")
        if ref_emb is embeddings and ref_labels is labels:
            raise ValueError(
                f"{name}: ref_emb=None; contrasting a batch with itself (SimCLR) leaves every row's pair with itself "
                f"out, which this loss cannot. Pass a second tensor, or take the host's own loss"
            )
        if ref_labels is None or ref_labels is labels:
            raise ValueError(
                f"{name}: ref_labels is the same object as labels, or None. The host then leaves the diagonal out, "
                f"that is each row's own pair; pass ref_labels=labels.clone() to have it in"
            )
        return self._losses(embeddings, labels, ref_emb, ref_labels)

    def _losses(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> dict[str, Any]:
        """What the host's compute_loss returns."""
        raise NotImplementedError

    def _rows(self, embeddings: Tensor, ref_emb: Tensor, target: Target) -> Tensor:
        """(N,) every row's loss."""
        x, y = F.normalize(embeddings, dim=1), F.normalize(ref_emb, dim=1)
        scale, backend = 1.0 / self.temperature, self.backend
        return softclip_loss(x, y, scale, target, reduction="none", direction="rows", backend=backend).rows


class SoftClipNTXentLoss(_TwoTensors, NTXentLoss):
    """NTXentLoss between two tensors, where a row has at most one positive. The host's arguments, and `backend` as
    softclip_loss takes it; its call, with (embeddings (N, D), labels (N,), ref_emb (M, D), ref_labels (M,)).

    Rows of several positives are refused with ValueError: this host contrasts each of them with the negatives alone,
    which is another loss than SupConLoss. So are one tensor, indices_tuple and other distances; a host of other
    signatures raises UnknownHost. Labels are read, for which a GPU waits, as it does in the host.
    """

    def _losses(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> dict[str, Any]:
        ordered, order = ref_labels.sort()
        first = torch.searchsorted(ordered, labels)
        number = torch.searchsorted(ordered, labels, right=True) - first
        if (several := int((number > 1).sum())) > 0:
            raise ValueError(
                f"SoftClipNTXentLoss: {several} of {len(labels)} rows have more than one positive in ref_labels; "
                f"allowed: one. SoftClipSupConLoss takes several, and the host's NTXentLoss contrasts each alone"
            )
        anchors = number.nonzero().flatten()
        if len(anchors) == 0:
            return self.zero_losses()
        column = order[first.clamp(max=len(order) - 1)]  # of a row without a positive: any, for its loss is left out
        losses = self._rows(embeddings, ref_emb, Hard(column))[anchors]
        return {"loss": {"losses": losses, "indices": (anchors, column[anchors]), "reduction_type": "pos_pair"}}


class SoftClipSupConLoss(_TwoTensors, SupConLoss):
    """SupConLoss between two tensors, of any number of positives a row: the same as SoftClipNTXentLoss beyond that."""

    def _losses(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> dict[str, Any]:
        if bool((labels == labels[0]).all()) and bool((ref_labels == labels[0]).all()):
            return self.zero_losses()  # as in the host, where nothing is a negative
        losses = self._rows(embeddings, ref_emb, Hard(groups=(labels, ref_labels)))
        indices = torch.arange(len(losses), device=losses.device)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}
