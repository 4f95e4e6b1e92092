"""The loss as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import backends, checks
from .functional import REDUCTIONS, Losses, softclip_loss
from .targets import Target, check_target


class SoftClipLoss(nn.Module):
    """softclip_loss with its options set once; a drop-in for open_clip's ClipLoss (without its rank and world size:
    give `group`). Holds no parameters and no state.

        SoftClipLoss()(image_features, text_features, logit_scale)
    """

    def __init__(
        self,
        target: Target | None = None,
        *,
        reduction: str = "mean",
        group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.one_of("reduction", reduction, REDUCTIONS)
        backends.canonical(backend)
        if target is not None:
            check_target("target", target)
        self.target = target
        self.reduction = reduction
        self.group = group
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        target: Target | None = None,
    ) -> Tensor | Losses | dict[str, Tensor | Losses]:
        """image_features (N, D), text_features (M, D), logit_scale one element, already exponentiated. `target` takes
        the place of the module's for this call. Returns the loss, or {"contrastive_loss": loss} with output_dict."""
        if logit_bias is not None:
            raise ValueError(
                "logit_bias has no effect on a softmax over logits; it belongs to a sigmoid loss: pass None"
            )
        loss = softclip_loss(
            image_features,
            text_features,
            logit_scale,
            self.target if target is None else target,
            reduction=self.reduction,
            group=self.group,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return f"target={self.target}, reduction={self.reduction!r}, backend={self.backend!r}"
