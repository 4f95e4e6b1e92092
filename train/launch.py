"""From `python -m train` to one process per rank, each knowing its rank, device and process group."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, cast

import torch
import torch.distributed as dist

from train import progress
from train.config import ConfigError, Job
from train.signals import INTERRUPTED, LAUNCHER, STOPPED, name_of, say, stop

CPU_PROCESSES = 2
BAD_REQUEST = 2  # exit status where the configuration, the data or the checkpoint does not allow the job
GRACE_SECONDS = 5  # in which a launcher ends the ranks that only follow another's failure
LOOK_SECONDS = 0.1  # between two looks at the ranks
WAIT = timedelta(days=7)  # of a collective: what bounds it is train.progress, which knows whether anybody moves
HERE = "127.0.0.1"
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


def is_own() -> bool:
    """Whether `launch` did; it holds the run's lock and says what the ranks do not."""
    return LAUNCHER in os.environ


def process_count(job: Job) -> int:
    """How many to start: as asked for, else one per GPU, else two."""
    return job.processes or (torch.cuda.device_count() if _on_gpu(job) else CPU_PROCESSES)


def launch(count: int, run: Path, arguments: Sequence[str], held: TextIO) -> int:
    """Run `python -m train` with `arguments` in `count` processes; returns the exit status. Where one fails the others
    are killed, and the message names the rank and its step. Asked to stop, it asks them and waits for their checkpoint.

    ``held``: the run's lock, which every process inherits, so that it holds until the last of them has ended.
    """
    stop.act_at_once(None)
    progress.clear(run)
    store = dist.TCPStore(HERE, 0, is_master=True, wait_for_workers=False)  # the ranks meet there
    shared = {
        "OMP_NUM_THREADS": str(max(_cpu_count() // count, 1)),
        **os.environ,
        LAUNCHER: str(os.getpid()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": HERE,
        "MASTER_PORT": str(store.port),
    }
    command = [sys.executable, "-m", "train", *arguments]
    ranks: list[subprocess.Popen[bytes]] = []
    stop.hurry = lambda: _kill(ranks)
    for rank in map(str, range(count)):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=own, pass_fds=[held.fileno()]))
    statuses = _follow(ranks)
    failed = {rank: status for rank, status in statuses.items() if status not in (0, STOPPED)}
    if INTERRUPTED in failed.values():
        return INTERRUPTED
    if failed:
        return _explain(run, *_first_to_fail(failed))
    if STOPPED not in statuses.values():
        return 0
    if ranks[0].returncode != STOPPED:  # a rank 0 that says so itself has that status
        say(stopped_early(run, name_of(stop.request or signal.SIGTERM)))
    return STOPPED


def stopped_early(run: Path, request: str) -> str:
    """The line of a job that was asked to stop before its first step."""
    return f"stopped by {request} before the first step of this job; go on with --resume {run}"


def _follow(ranks: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """The exit statuses of the ranks once all have ended, or of those that ended by themselves up to the first failure,
    after which the others are killed: they may wait for the lost one for ever."""
    statuses: dict[int, int] = {}
    asked = False
    while len(statuses) < len(ranks) and not any(status not in (0, STOPPED) for status in statuses.values()):
        if not asked and (stop.request or STOPPED in statuses.values()):
            asked = True
            for process in ranks:  # never by SIGINT: a terminal's reaches them too, and a second one ends them at once
                process.terminate()
        time.sleep(LOOK_SECONDS)
        for rank, process in enumerate(ranks):
            status = process.poll()
            if status is not None:  # asked before it could listen, it is ended by the signal itself
                statuses[rank] = STOPPED if asked and status == -signal.SIGTERM else status
    _kill(ranks)
    return statuses


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        process.kill()
    for process in ranks:
        process.wait()


def _explain(run: Path, rank: int, status: int) -> int:
    """Say which rank failed, unless it has said all itself; returns the exit status of the job."""
    if status == BAD_REQUEST:
        return BAD_REQUEST
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else "ended"
    places = [str(place) for place in progress.read(run)]
    say(
        f"error: rank {rank} was the first to fail ({how}, exit status {status}), and the job was ended. "
        f"Last seen: {'; '.join(places) or 'nothing'}. Go on from the last checkpoint with --resume {run}"
    )
    return status if status > 0 else 1


def _first_to_fail(statuses: dict[int, int]) -> tuple[int, int]:
    """The rank whose failure the others followed, of those that ended within one look, and its exit status: one that a
    signal killed comes before those that noticed and ended."""
    return min(statuses.items(), key=lambda entry: (entry[1] >= 0, entry[0]))


@contextmanager
def world(job: Job) -> Iterator[World]:
    """The process group of all ranks that a launcher started, destroyed at the end."""
    on_gpu = _on_gpu(job)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=_store(rank, size), rank=rank, world_size=size, timeout=WAIT
    )
    try:
        if not on_gpu:
            torch.set_num_threads(max(_cpu_count() // _ranks_on_this_machine(), 1))
        yield World(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _store(rank: int, size: int) -> dist.Store:
    """Where the ranks find each other. torchrun keeps one store over its restarts (torch 2.13), in which a rank would
    read the addresses of those that are gone."""
    if is_own():
        return dist.TCPStore(HERE, int(os.environ["MASTER_PORT"]), is_master=False, timeout=WAIT)
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=WAIT))
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def leave(status: int) -> NoReturn:
    """End a rank's process at once, without the interpreter's own end. Gloo's threads may still be releasing the
    tensors of collectives that are over; one that needs the interpreter for it while that is ending aborts the process:
    exit status -6 after all is done and saved (in 7 of 57 jobs on a busy machine; ZeRO-3, torch 2.13, Python 3.11)."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone. Gloo has no error class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


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


def asked_to_stop(world: World) -> int:
    """The request of any rank (see signals.Stop), the same on all of them; 0 where there is none."""
    request = torch.tensor([stop.request], device=world.device)
    dist.all_reduce(request, dist.ReduceOp.MAX, group=world.group)
    return int(request)


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
