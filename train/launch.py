"""From `python -m train` to one process per rank, each knowing its rank, device and process group."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from train import progress
from train.config import ConfigError, Job

CPU_PROCESSES = 2
BAD_REQUEST = 2  # exit status where the configuration, the data or the checkpoint does not allow the job
T = TypeVar("T")


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
        rank, failure = error.get_first_failure()
        if failure.exitcode == BAD_REQUEST:
            return BAD_REQUEST  # rank 0 has said what is wrong with it
        how = f"killed by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else "ended"
        places = [str(place) for place in progress.read(run)]
        print(
            f"error: rank {rank} was the first to fail ({how}, exit status {failure.exitcode}), and the job was ended. "
            f"Last seen: {'; '.join(places) or 'nothing'}. Go on from the last checkpoint with --resume {run}",
            file=sys.stderr,
        )
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


@contextmanager
def world(job: Job) -> Iterator[World]:
    """The process group of all ranks that a launcher started, destroyed at the end."""
    on_gpu = _on_gpu(job)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(_cpu_count() // local_size, 1))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=job.timeout_seconds))
    try:
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
    """Run `act` on rank 0 and give its result to all; where it raises there, every rank raises the same error."""
    outcome: list[Any] = [None, None]
    if world.rank == 0:
        try:
            outcome[0] = act()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=world.group, device=world.device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _cpu_count() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_gpu(job: Job) -> bool:
    if job.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("job.device='cuda', but torch sees no GPU; use job.device=cpu, or auto")
    return job.device != "cpu" and torch.cuda.is_available()
