"""How often the right items are found among the nearest ones, in shares over all ranks, on the device.

Items that are equally near stand in random order: what counts is the chance that the first k of them hold a right one.
A model that gives all pictures one embedding is then as good as a guess, and no better for the order of a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import heartbeat
from ..world import World
from .shares import in_shares

BLOCK = 256  # queries at a time: the matrix of all similarities is never there


def hits(queries: Tensor, items: Tensor, right: Tensor, depths: Sequence[int], world: World) -> Tensor:
    """Of each query and each k of `depths`, the chance that a right item is among the k nearest: (n, len(depths))
    float64 on the CPU, the same on every rank and for any number of ranks.

    queries (n, E) and items (m, E) are unit rows; right (p, 2) int64 holds the pairs of a query and an item that is
    right for it, each once, in the order of queries.
    """
    items = items.to(world.device)
    count = math.ceil(len(queries) / BLOCK)
    bounds = torch.searchsorted(right[:, 0].contiguous(), BLOCK * torch.arange(count + 1))

    def block(number: int) -> Tensor:
        own = right[bounds[number] : bounds[number + 1]].to(world.device)
        similarity = queries[BLOCK * number : BLOCK * (number + 1)].to(world.device) @ items.T
        is_right = torch.zeros_like(similarity, dtype=torch.bool)
        is_right[own[:, 0] - BLOCK * number, own[:, 1]] = True
        best = similarity.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
        tied = similarity == best
        better = ~(similarity <= best) & ~is_right  # NaN is nobody's find
        heartbeat.tick()
        return expected_hits(better.sum(1), (tied & ~is_right).sum(1), (tied & is_right).sum(1), depths).cpu()

    return torch.cat(in_shares(world, count, block))


def expected_hits(better: Tensor, wrong: Tensor, right: Tensor, depths: Sequence[int]) -> Tensor:
    """The chance that the first k items, for each k of `depths`, hold a right one, where `better` wrong ones come
    first, and then `wrong` wrong ones and `right` right ones in random order; (n,) int64 each → (n, len(depths))
    float64."""
    columns = []
    for depth in depths:
        miss = torch.ones(len(better), dtype=torch.float64, device=better.device)
        for drawn in range(depth):
            of_the_rest = (wrong - drawn).clamp(min=0).double() / (wrong + right - drawn).clamp(min=1)
            miss = torch.where(better + drawn < depth, miss * of_the_rest, miss)
        columns.append(1 - miss)
    return torch.stack(columns, 1)
