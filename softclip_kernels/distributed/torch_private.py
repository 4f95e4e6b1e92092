"""What the library uses of torch.distributed beyond its public interface, each with the versions it was read in.

One place, so that a new PyTorch is checked against one file; tests/distributed/test_torch_private.py calls each of
them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# The newer names of two collectives, where this PyTorch has them (2.13 does; 2.8 to 2.12 have the others only).
all_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Whether the loss over ranks may be a node of a graph: `recording` and `keep_in_order` were tried with 2.13.
IN_GRAPHS: bool = torch.__version__ >= "2.13"


def device_types(group: Any) -> list[torch.device]:
    """The kinds of device that the group exchanges on. ProcessGroup._device_types, torch 2.8 to 2.13."""
    return group._device_types


def is_gloo(group: Any, device: torch.device) -> bool:
    """Whether the group exchanges tensors of this device over gloo. ProcessGroup._get_backend, torch 2.8 to 2.13; the
    public dist.get_backend names one backend for all devices."""
    return group._get_backend(device).name() == "gloo"


def store() -> dist.Store:
    """The store that the default group was made with. distributed_c10d._get_default_store, torch 2.8 to 2.13."""
    return dist.distributed_c10d._get_default_store()


def group_named(name: str) -> Any:
    """The process group whose `group_name` this is. distributed_c10d._resolve_process_group, torch 2.13."""
    resolve: Any = dist.distributed_c10d._resolve_process_group  # whose types differ between versions
    return resolve(name)


def recording() -> Any:
    """A context in which autograd records as it does outside a custom operator, whose kernel PyTorch calls with
    autograd's dispatch keys left out. torch._C._ForceDispatchKeyGuard and the sets of keys, torch 2.13."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded - keys)


def keep_in_order(operator: Any) -> None:
    """Graphs run this operator's calls as often and in the order that they were traced in, whether their results are
    used or not. torch._higher_order_ops.effects, torch 2.13."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    _register_effectful_op(operator, _EffectType.ORDERED)


def compiled_from(module: nn.Module) -> nn.Module | None:
    """What torch.compile made this module of, None of any other. OptimizedModule._orig_mod, torch 2.8 to 2.13."""
    return module.__dict__.get("_modules", {}).get("_orig_mod")


def copy_bare(
    module: nn.Module, core: Callable[[nn.Module], nn.Module], parameters: dict[int, nn.Parameter]
) -> nn.Module:
    """A copy that runs the forward pass alone: without the hooks of torch.distributed and DeepSpeed, and with
    `core(part)` in the place of every part, itself included. `parameters`: what stands in the place of each, by its
    id. copy.deepcopy would copy a wrapper's shares of parameters, and fully_shard forbids it.

    nn.Module's `_parameters`, its dicts of hooks and what torch.compile, fully_shard and DeepSpeed put beside them;
    torch 2.8 to 2.13, DeepSpeed 0.19."""
    from torch.distributed.fsdp import FSDPModule  # takes a while, and a loss needs none

    memo: dict[int, Any] = dict(parameters)
    shells: dict[int, tuple[nn.Module, Any]] = {}
    for part in module.modules():
        own = core(part)
        # fully_shard puts a class of its own before a module's
        plain = next(kind for kind in type(own).__mro__ if not issubclass(kind, FSDPModule))
        memo[id(part)] = shells.setdefault(id(own), (own, plain.__new__(plain)))[1]
    for own, shell in shells.values():
        for name, value in own.__dict__.items():
            if name.startswith(("ds_", "_original_parameters", "_compiled_call_impl", "__composable_api")):
                continue
            if name == "_parameters":  # DeepSpeed's is of a class that fetches what it is asked for
                value = dict(value)
            elif name.endswith("_hooks"):
                value = type(value)((key, hook) for key, hook in value.items() if not _is_a_wrappers(hook))
            try:
                shell.__dict__[name] = copy.deepcopy(value, memo)
            except (RuntimeError, TypeError):  # a process group, a stream, a tensor with a graph: shared
                shell.__dict__[name] = value
    return shells[id(core(module))][1]


def _is_a_wrappers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(("torch.distributed.", "deepspeed."))
