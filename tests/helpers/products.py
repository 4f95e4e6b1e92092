"""How much matrix multiplication PyTorch is asked for."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LEFT_FACTOR = {"mm": 0, "addmm": 1, "addmm_": 1}  # its place among an operator's arguments; the right one follows


class Products(TorchDispatchMode):
    """Counts floating-point operations of two-dimensional products, also in place (FlopCounterMode sees no addmm_)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        left = LEFT_FACTOR.get(function.overloadpacket.__name__)
        if left is not None:
            factor: torch.Tensor = args[left]
            self.operations += 2 * factor.shape[0] * factor.shape[1] * args[left + 1].shape[1]
        return function(*args, **(kwargs or {}))
