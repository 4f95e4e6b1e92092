"""The optimizers that optimizer.name asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import ConfigError, OptimizerOptions

TIMM = "timm:"
PROBE_STEPS = 3


def make_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions, zero_stage: int) -> torch.optim.Optimizer:
    """Over parameter groups as Bundle.parameter_groups gives them; step.train_step sets their learning rates.

    Nothing is compiled: AdamW and SGD are PyTorch's. Raises ConfigError where timm lacks the one that is asked for, and
    where ZeRO would have it compute something else.
    """
    if options.name == "adamw":
        betas = (options.betas[0], options.betas[1])
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps)
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.betas[0])
    if zero_stage > 0 and not _is_elementwise(options):
        raise ConfigError(
            f"optimizer.name={options.name!r} with job.zero_stage={zero_stage}: it looks at a parameter as a whole, and "
            "ZeRO shows it pieces; allowed: job.zero_stage=0, or an optimizer that takes each element by itself, such "
            "as adamw, sgd, timm:nadamw or timm:lion"
        )
    return _timm(groups, options)


def _timm(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    try:
        from timm.optim import create_optimizer_v2, get_optimizer_info
    except ImportError as error:
        raise ConfigError(
            f"optimizer.name={options.name!r} needs timm ({error}): pip install 'softclip-kernels[timm]'"
        ) from error
    name = options.name.removeprefix(TIMM)
    try:
        info = get_optimizer_info(name)
    except ValueError as error:
        raise ConfigError(f"optimizer.name={options.name!r}; allowed: a name of timm.optim.list_optimizers()") from error
    if info.second_order:
        raise ConfigError(f"optimizer.name={options.name!r} needs second derivatives, which no loss here has; use adamw")
    # What an optimizer does not know it is not given; one of three betas keeps its own.
    given: dict[str, Any] = {"eps": options.eps} if info.has_eps else {}
    if info.has_betas and info.num_betas == 2:
        given["betas"] = (options.betas[0], options.betas[1])
    return create_optimizer_v2(groups, opt=name, lr=options.lr, momentum=options.betas[0], **given)


def _is_elementwise(options: OptimizerOptions) -> bool:
    """Whether it updates a matrix as it updates the matrix's elements in two flat pieces, which is how ZeRO holds them.
    Tried out: timm has some hundred optimizers, and more with every version."""
    whole = torch.linspace(-1.0, 1.0, 12).view(3, 4).sin()
    pieces = [piece.clone() for piece in whole.flatten().split((5, 7))]
    together, apart = _probe([whole.clone()], options), _probe(pieces, options)
    return torch.allclose(together, apart, rtol=1e-4, atol=1e-7)


def _probe(tensors: list[Tensor], options: OptimizerOptions) -> Tensor:
    """The elements of `tensors` after some steps, whose gradients are functions of the elements' places."""
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
    optimizer = _timm([{"params": parameters, "weight_decay": 0.1}], options)
    for step in range(PROBE_STEPS):
        gradient = torch.linspace(1.0, 3.0, 12).mul(step + 1.0).cos()
        parts = gradient.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.clone().view_as(parameter)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
