"""Work that all ranks do together, each its share of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ..world import World, on_each

T = TypeVar("T")
ALONE = World(0, 1, torch.device("cpu"), None)


def in_shares(world: World, count: int, work: Callable[[int], T]) -> list[T]:
    """[work(0), ..., work(count - 1)] on every rank, each computed whole by one of them: so what a part gives does not
    depend on how many ranks there are. Where one fails, it raises its error, and the others an ElsewhereError."""
    mine = on_each(world, lambda: [work(part) for part in range(world.rank, count, world.size)])
    if world.size == 1:
        return mine
    shares: list[list[T]] = [[] for _ in range(world.size)]
    dist.all_gather_object(shares, mine, group=world.group)
    return [shares[part % world.size][part // world.size] for part in range(count)]
