"""What is spread over ranks or held by a wrapper, whole on every rank: a batch, parameters, gradients. For checks, not
for training: whole objects are gathered, and every rank holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import torch_private
from .accumulation import is_engine
from .agreement import agree
from .exchange import Exchange

T = TypeVar("T")


def gather(value: Any, exchange: Exchange | None) -> list[Any]:
    """Every rank's value, in rank order. Tensors are to be on the CPU."""
    if exchange is None:
        return [value]
    values = [None] * dist.get_world_size(exchange.group)
    dist.all_gather_object(values, value, group=exchange.group)
    return values


def together(exchange: Exchange | None, phase: str, act: Callable[[], T]) -> T:
    """`act()`; where it raises on one rank, every rank raises, and none waits for another."""
    return act() if exchange is None else agree(exchange, phase, act, lambda _: [])[0]


def gather_batch(batch: Any, exchange: Exchange | None) -> tuple[Any, list[int]]:
    """The batch of all ranks, and how many samples each has. In a batch (tuples, lists, dicts) the tensors of one
    dimension or more are concatenated along the first, in rank order; all else is this rank's own."""
    leaves, structure = tree_flatten(batch)
    samples = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    parts = gather([leaves[k].detach().cpu() for k in samples], exchange)
    if len({len(part) for part in parts}) > 1 or not parts[0]:
        raise ValueError(
            f"the batches of the ranks hold {[len(part) for part in parts]} tensors of samples; every rank must bring "
            "as many, and at least one, of shape (samples, ...)"
        )
    for position, k in enumerate(samples):
        leaves[k] = torch.cat([part[position] for part in parts]).to(leaves[k].device)
    return tree_unflatten(leaves, structure), [len(part[0]) for part in parts]


def unwrapped(module: Any) -> nn.Module:
    """What DistributedDataParallel, DeepSpeed and torch.compile wrap; any other module is itself."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)) or is_engine(module):
            module = module.module
            continue
        inner = torch_private.compiled_from(module)
        if inner is None:
            return module
        module = inner


def full_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter, whole on every rank: plain ones, fully_shard's and those of ZeRO-3."""
    parameters = dict(module.named_parameters())
    with _fetched(parameters.values()):
        return {name: full(parameter.detach()).clone() for name, parameter in parameters.items()}


def full(tensor: Tensor) -> Tensor:
    """A DTensor of fully_shard is made whole, which every rank takes part in."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _fetched(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def bare_double(module: nn.Module, full: Mapping[str, Tensor]) -> nn.Module:
    """A float64 copy of an unwrapped module that communicates with nobody, with the parameters of
    `full_parameters(module)`."""
    parameters = {
        id(parameter): nn.Parameter(full[name].double(), parameter.requires_grad)
        for name, parameter in module.named_parameters()
    }
    return torch_private.copy_bare(module, unwrapped, parameters).double()


def full_gradients(model: nn.Module, module: nn.Module, exchange: Exchange | None) -> dict[str, Tensor | None]:
    """What this rank's optimizer would use, whole, in float64 on the CPU: of every parameter that learns."""
    learning = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if is_engine(model):
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(parameter) for name, parameter in learning.items()}
    else:
        found = {name: parameter.grad for name, parameter in learning.items()}
        # To make a share whole takes every rank that has one; a rank without a gradient would be waited for.
        everywhere = gather([name for name, gradient in found.items() if gradient is not None], exchange)
        for name, gradient in found.items():
            if hasattr(gradient, "full_tensor"):
                found[name] = full(gradient) if all(name in present for present in everywhere) else None
    return {name: None if gradient is None else gradient.detach().double().cpu() for name, gradient in found.items()}
