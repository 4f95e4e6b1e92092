"""Bytes that a forward pass keeps for its backward pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from softclip_kernels.backends import cpu


def saved_bytes(run: Callable[[], object]) -> int:
    """The sizes of the distinct storages that autograd saves while `run` makes a graph, which lives until it returns
    something that holds it."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address serves twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(storages.values())


def growth(sizes: tuple[int, int, int], run: Callable[[int], object]) -> float:
    """How much faster than linear what is saved grows: the increase from the second to the third size, in units of what
    the increase from the first to the second foretells. 1 is linear; a matrix of all pairs is above it. Without the
    logits of small problems that the CPU kernels keep, which end at a constant."""
    with mock.patch.dict(os.environ, {cpu.KEPT_VARIABLE: "0"}):
        first, second, third = (saved_bytes(lambda size=size: run(size)) for size in sizes)  # type: ignore[misc]
    return (third - second) / (second - first) / ((sizes[2] - sizes[1]) / (sizes[1] - sizes[0]))
