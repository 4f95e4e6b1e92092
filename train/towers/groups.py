"""Parameter groups of the optimizer: weight decay for matrices and kernels only, and learning rates by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..options import ConfigError


def without_layers(
    module: nn.Module, weight_decay: float, layer_decay: float | None, towers: str
) -> list[dict[str, Any]]:
    """Of towers whose library knows no layers. `towers` names them in the ConfigError."""
    if layer_decay is not None:
        raise ConfigError(
            f"optimizer.layer_decay={layer_decay} with model.towers={towers}; allowed: null, or an image tower of "
            "timm's, whose layers timm knows"
        )
    return _by_dimension(module.parameters(), weight_decay)


def with_timm_layers(
    module: nn.Module, trunk: nn.Module, weight_decay: float, layer_decay: float | None
) -> list[dict[str, Any]]:
    """Of towers that hold a timm model as `trunk`: its layers as timm counts them; all else learns at the full rate."""
    if layer_decay is None:
        return _by_dimension(module.parameters(), weight_decay)
    from timm.optim import param_groups_layer_decay

    layers = param_groups_layer_decay(trunk, weight_decay, layer_decay=layer_decay)
    inside = {id(parameter) for parameter in trunk.parameters()}
    outside = (parameter for parameter in module.parameters() if id(parameter) not in inside)
    return layers + _by_dimension(outside, weight_decay)


def _by_dimension(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Not for biases, norms or the logit scale."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.dim() > 1]
    plain = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
