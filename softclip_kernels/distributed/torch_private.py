"""What the library uses of torch.distributed beyond its public interface, each with the versions it was read in.

One place, so that a new PyTorch is checked against one file; tests/distributed/test_torch_private.py calls each of
them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# The newer names of two collectives, where this PyTorch has them (2.13 does; 2.8 to 2.12 have the others only).
all_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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
