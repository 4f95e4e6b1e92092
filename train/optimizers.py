"""The optimizers that optimizer.name asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import ConfigError, OptimizerOptions

TIMM = "timm:"
SHAPE, CUT = (64, 48), (1000, 2072)


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
    optimizer = _timm(groups, options)
    if zero_stage == 0:
        return optimizer
    asked = f"optimizer.name={options.name!r} with job.zero_stage={zero_stage}"
    allowed = "job.zero_stage=0, or one that takes each element by itself, such as adamw, sgd, timm:nadamw or timm:lion"
    if not _is_elementwise(options):
        raise ConfigError(f"{asked}: it looks at a parameter as a whole, and ZeRO shows it pieces; allowed: {allowed}")
    if optimizer.state:
        raise ConfigError(f"{asked}: it keeps state of parameters before ZeRO has cut them; allowed: {allowed}")
    return optimizer


def _timm(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    asked = f"optimizer.name={options.name!r}"
    try:
        from timm.optim import create_optimizer_v2, get_optimizer_info
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that does not fit torch
        raise ConfigError(f"{asked} needs timm ({error}): pip install 'softclip-kernels[timm]'") from error
    name = options.name.removeprefix(TIMM)
    try:
        info = get_optimizer_info(name)
    except ValueError as error:
        raise ConfigError(f"{asked}; allowed: a name of timm.optim.list_optimizers()") from error
    if info.second_order:
        raise ConfigError(f"{asked} needs second derivatives, which no loss here has; use adamw")
    # What an optimizer does not know it is not given; one of three betas keeps its own.
    given: dict[str, Any] = {"eps": options.eps} if info.has_eps else {}
    if info.has_betas and info.num_betas == 2:
        given["betas"] = (options.betas[0], options.betas[1])
    try:
        return create_optimizer_v2(groups, opt=name, lr=options.lr, momentum=options.betas[0], **given)
    except (AssertionError, ImportError) as error:  # of those that stand on other libraries yet
        raise ConfigError(f"{asked} cannot be made here ({error}); use adamw") from error


def _is_elementwise(options: OptimizerOptions) -> bool:
    """Whether it updates a matrix as it updates the matrix's elements in two flat pieces, which is how ZeRO holds them.
    Tried out: timm has some hundred optimizers, and more with every version. The matrix is large enough for those that
    treat only large ones in another way, one part of it has another size than the other, and its first gradient is
    orthogonal to it: some optimizers do something else only there."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(SHAPE, generator=draw) * torch.linspace(0.02, 0.2, SHAPE[0])[:, None]
    gradients = [torch.randn(SHAPE, generator=draw) for _ in range(3)]
    gradients[0] -= whole * (gradients[0] * whole).sum() / whole.square().sum()
    pieces = whole.flatten().split(CUT)
    together = _stepped([whole], gradients, options)
    apart = _stepped(pieces, gradients, options)
    return torch.allclose(together, apart, rtol=1e-4, atol=1e-6)


def _stepped(tensors: Sequence[Tensor], gradients: list[Tensor], options: OptimizerOptions) -> Tensor:
    """The elements of `tensors` after a step with each gradient, which is cut as they are."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
    optimizer = _timm([{"params": parameters, "weight_decay": 0.1, "lr": 0.1}], options)
    for gradient in gradients:
        for parameter, part in zip(parameters, gradient.flatten().split([one.numel() for one in tensors]), strict=True):
            parameter.grad = part.clone().view_as(parameter)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
