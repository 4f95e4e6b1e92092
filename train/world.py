"""What the processes of a job are to each other: rank, device and process group, and what they do together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from .config import JobOptions
from .launch import LOOPBACK, is_launched_by_train, on_gpu
from .signals import stop
from .threads import threads_of

WAIT = timedelta(days=7)  # of a collective: what bounds it is the heartbeat, which knows whether anybody moves
T = TypeVar("T")


class ElsewhereError(RuntimeError):
    """Another rank failed first, and says itself what is wrong."""


@dataclass(frozen=True)
class World:
    """This process among the job's.

    threads     how many of the CPU's it computes with
    ranks_here  how many of the processes share this machine
    """

    rank: int
    size: int
    device: torch.device
    group: Any
    threads: int = 1
    ranks_here: int = 1


@contextmanager
def join_world(options: JobOptions) -> Iterator[World]:
    """The process group of all ranks that a launcher started, destroyed at the end."""
    cuda = on_gpu(options)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=_store(rank, size), rank=rank, world_size=size, timeout=WAIT
    )
    try:
        ranks_here = _ranks_on_this_machine()
        threads = threads_of(options.threads, ranks_here)
        torch.set_num_threads(threads)
        yield World(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD, threads, ranks_here)
    finally:
        dist.destroy_process_group()


def _store(rank: int, size: int) -> dist.Store:
    """Where the ranks find each other. torchrun keeps one store over its restarts (torch 2.13), in which a rank would
    read the addresses of those that are gone."""
    if is_launched_by_train():
        return dist.TCPStore(LOOPBACK, int(os.environ["MASTER_PORT"]), is_master=False, timeout=WAIT)
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=WAIT))
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def on_first(world: World, act: Callable[[], T]) -> T:
    """Run `act` on rank 0 and give its result to all; where it raises, the others raise an ElsewhereError. A single
    rank needs no process group for it, nor for on_each."""
    if world.size == 1:
        return act()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if world.rank == 0:
        try:
            outcome[0] = act()
        except Exception as error:
            failure, outcome[1] = error, f"rank 0: {error}"
    dist.broadcast_object_list(outcome, src=0, group=world.group, device=world.device)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise ElsewhereError(outcome[1])
    return outcome[0]


def on_each(world: World, act: Callable[[], T]) -> T:
    """Run `act` on every rank and go on once all have done it. The first rank where it raises raises that error, all
    others an ElsewhereError, so that what all ranks find alike is said once, and what one finds is said at all."""
    if world.size == 1:
        return act()
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    reports: list[str | None] = [None] * world.size
    try:
        dist.all_gather_object(reports, None if failure is None else str(failure), group=world.group)
    except RuntimeError as error:
        raise failure or error from None  # the others never came; what this rank knows is worth more than that
    failed = next((rank for rank, report in enumerate(reports) if report is not None), None)
    if failed is None:
        return cast(T, result)
    if failed == world.rank and failure is not None:
        raise failure
    raise ElsewhereError(f"rank {failed}: {reports[failed]}")


def asked_to_stop(world: World) -> int:
    """The request of any rank (see signals.Stop), the same on all of them; 0 where there is none."""
    request = torch.tensor([stop.request], device=world.device)
    dist.all_reduce(request, dist.ReduceOp.MAX, group=world.group)
    return int(request)


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone. Gloo has no error class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _ranks_on_this_machine() -> int:
    """Not every launcher tells (LOCAL_WORLD_SIZE is torchrun's), so the ranks count their host names."""
    hosts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts.count(socket.gethostname())
