"""The softmax contrastive loss as a module: softclip_loss with its options set once, in ClipLoss's place."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .. import backends, checks, guard_rails
from ..distributed.exchange import WORLD, Exchange
from ..targets.base import Target, check_target
from .softmax import DIRECTIONS, REDUCTIONS, Losses, softclip_loss

CLIP_LOSS = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod")


class SoftClipLoss(nn.Module):
    """softclip_loss with its options set once; a drop-in for open_clip's ClipLoss. Holds no parameters and no state,
    and can be copied and pickled (with a group: the default one).

        SoftClipLoss()(image_features, text_features, logit_scale)

    target, reduction,   as softclip_loss takes them
    direction, group,
    backend
    clip_loss            what ClipLoss takes, for code that makes its loss with these names: local_loss,
                         gather_with_grad, cache_labels, rank, world_size, use_horovod. A world_size above 1 stands for
                         group="world" and must be the job's; the first three change nothing, since the gradients are
                         exact whatever they say; use_horovod is refused
    """

    def __init__(
        self,
        target: Target | None = None,
        *,
        reduction: str = "mean",
        direction: str = "both",
        group: Any = None,
        backend: str = "auto",
        **clip_loss: Any,
    ) -> None:
        super().__init__()
        checks.one_of("reduction", reduction, REDUCTIONS)
        checks.one_of("direction", direction, DIRECTIONS)
        if target is not None:
            check_target("target", target)
        self.target = target
        self.reduction, self.direction = reduction, direction
        self.group = _group_of(group, clip_loss) if clip_loss else group
        self.backend = backends.current_name(backend)
        backends.check_name(self.backend)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        target: Target | None = None,
    ) -> Tensor | Losses | dict[str, Tensor | Losses]:
        """image_features (N, D), text_features (M, D), logit_scale one element, already exponentiated. A logit_bias
        changes nothing and gets a gradient of zero, so that no parameter of a model is ever unused. `target` takes the
        place of the module's for this call. Returns the loss, or {"contrastive_loss": loss} with output_dict."""
        if isinstance(logit_bias, Target) or isinstance(output_dict, Target):
            raise TypeError("after logit_scale come logit_bias and output_dict, as in ClipLoss; give target= by name")
        loss = softclip_loss(
            image_features,
            text_features,
            logit_scale,
            self.target if target is None else target,
            reduction=self.reduction,
            direction=self.direction,
            group=self.group,
            backend=self.backend,
        )
        if logit_bias is not None:
            guard_rails.bias()
            nothing = 0.0 * logit_bias.sum()
            loss = Losses(loss.rows + nothing, loss.columns + nothing) if isinstance(loss, Losses) else loss + nothing
        return {"contrastive_loss": loss} if output_dict else loss

    def __getstate__(self) -> dict[str, Any]:
        group = self.group
        return {**self.__dict__, "group": Exchange(group) if isinstance(group, dist.ProcessGroup) else group}

    def extra_repr(self) -> str:
        options = f"reduction={self.reduction!r}, direction={self.direction!r}, backend={self.backend!r}"
        return f"target={self.target}, {options}"


def _group_of(group: Any, given: dict[str, Any]) -> Any:
    """The group that ClipLoss's keywords mean."""
    if unknown := sorted(set(given) - set(CLIP_LOSS)):
        raise TypeError(
            f"SoftClipLoss got {', '.join(unknown)}; allowed: target, reduction, direction, group, backend and, as in "
            f"ClipLoss, {', '.join(CLIP_LOSS)}"
        )
    if given.get("use_horovod"):
        raise ValueError("use_horovod=True is not supported; allowed: torch.distributed, with group= or world_size=")
    world_size, rank = given.get("world_size", 1), given.get("rank", 0)
    if group is not None:
        raise ValueError(f"give group= or ClipLoss's keywords, not both: {', '.join(given)}")
    if world_size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"world_size={world_size}, but torch.distributed is not initialized: make the loss after "
            f"init_process_group, or with group={WORLD!r}, which is looked up at each call"
        )
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise ValueError(
            f"rank={rank}, world_size={world_size}, but this is rank {dist.get_rank()} of {dist.get_world_size()}"
        )
    return WORLD
