"""From `python -m train` to one process per rank, each knowing its rank, device and process group."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from train import progress
from train.config import ConfigError, Job

CPU_PROCESSES = 2
BAD_REQUEST = 2  # exit status where the configuration, the data or the checkpoint does not allow the job
GRACE_SECONDS = 5  # in which a launcher ends the ranks that only follow another's failure
T = TypeVar("T")


class ElsewhereError(RuntimeError):
    """Another rank failed first, and says itself what is wrong."""


@dataclass(frozen=True)
class World:
    """This process among the job's."""

    rank: int
    size: int
    device: torch.device
    group: Any


def is_launched() -> bool:
    """Whether torchrun, the deepspeed launcher or `launch` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def process_count(job: Job) -> int:
    """How many to start: as asked for, else one per GPU, else two."""
    return job.processes or (torch.cuda.device_count() if _on_gpu(job) else CPU_PROCESSES)


def launch(count: int, run: Path, arguments: Sequence[str]) -> int:
    """Run `python -m train` with `arguments` in `count` processes, as torchrun would; returns the exit status. Where a
    process dies the others are asked to end, killed 30 s later, and the message names the rank and its step."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(_cpu_count() // count, 1)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    progress.clear(run)
    try:
        elastic_launch(settings, sys.executable)("-m", "train", *arguments)
    except ChildFailedError as error:
        rank, failure = _first_to_fail(error.failures)
        if failure.exitcode == BAD_REQUEST:
            return BAD_REQUEST  # the first rank to find what is wrong has said so
        how = f"killed by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else "ended"
        places = [str(place) for place in progress.read(run)]
        print(
            f"error: rank {rank} was the first to fail ({how}, exit status {failure.exitcode}), and the job was ended. "
            f"Last seen: {'; '.join(places) or 'nothing'}. Go on from the last checkpoint with --resume {run}",
            file=sys.stderr,
        )
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _first_to_fail(failures: dict[int, Any]) -> tuple[int, Any]:
    """The rank whose failure the others followed. One that a signal killed comes before those that noticed and ended,
    often within one look of the launcher, whose own signal to the rest does not count."""

    def order(entry: tuple[int, Any]) -> tuple[bool, int]:
        _, failure = entry
        killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        return not killed, failure.timestamp

    return min(failures.items(), key=order)


@contextmanager
def world(job: Job) -> Iterator[World]:
    """The process group of all ranks that a launcher started, destroyed at the end."""
    on_gpu = _on_gpu(job)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=job.timeout_seconds))
    try:
        if not on_gpu:
            torch.set_num_threads(max(_cpu_count() // _ranks_on_this_machine(), 1))
        yield World(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End a rank's process at once, without the interpreter's own end. Gloo's threads may still be releasing the
    tensors of collectives that are over; one that needs the interpreter for it while that is ending aborts the process:
    exit status -6 after all is done and saved (in 7 of 57 jobs on a busy machine; ZeRO-3, torch 2.13, Python 3.11)."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def on_first(world: World, act: Callable[[], T]) -> T:
    """Run `act` on rank 0 and give its result to all; where it raises, the others raise an ElsewhereError."""
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


def _ranks_on_this_machine() -> int:
    """Not every launcher tells (LOCAL_WORLD_SIZE is torchrun's), so the ranks count their host names."""
    hosts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts.count(socket.gethostname())


def _cpu_count() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_gpu(job: Job) -> bool:
    if job.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("job.device='cuda', but torch sees no GPU; use job.device=cpu, or auto")
    return job.device != "cpu" and torch.cuda.is_available()
