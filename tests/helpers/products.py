"""What PyTorch is asked for: matrix products, tensors of which shapes, bytes sent from rank to rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
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


class Shapes(TorchDispatchMode):
    """The shapes of everything that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


@contextmanager
def bytes_sent() -> Iterator[list[int]]:
    """A list that grows by the size of every tensor that this rank sends point to point."""
    sent: list[int] = []
    exchange_all = dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> Any:
        sent.extend(one.tensor.numel() * one.tensor.element_size() for one in operations if one.op is dist.isend)
        return exchange_all(operations)

    with mock.patch.object(dist, "batch_isend_irecv", counted):
        yield sent
