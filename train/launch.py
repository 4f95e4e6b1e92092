"""From one command to one process for each rank: starting them, following them, and saying how they ended. What
the processes are to each other is in world."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import torch
import torch.distributed as dist

from . import heartbeat, threads
from .config import ConfigError, JobOptions
from .signals import INTERRUPTED, LAUNCHER, STOPPED, name_of, say, stop

CPU_PROCESSES = 2
BAD_REQUEST = 2  # exit status where the configuration, the data or the checkpoint does not allow the job
GRACE_SECONDS = 5  # in which a launcher ends the ranks that only follow another's failure
LOOK_SECONDS = 0.1  # between two looks at the ranks
LOOPBACK = "127.0.0.1"


def is_launched() -> bool:
    """Whether torchrun, the deepspeed launcher or `launch` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_launched_by_train() -> bool:
    """Whether `launch` started it. Its process holds the run's lock, and says what the ranks do not."""
    return LAUNCHER in os.environ


def process_count(options: JobOptions) -> int:
    """How many to start: as asked for, else one per GPU, else two."""
    return options.processes or (torch.cuda.device_count() if on_gpu(options) else CPU_PROCESSES)


def launch(count: int, run: Path, arguments: Sequence[str], held: TextIO) -> int:
    """Run the trainer with `arguments` in `count` processes; returns the exit status. Where one fails the others
    are killed, and the message names the rank and its step. Asked to stop, it asks them and waits for their checkpoint.
    `held`: the run's lock, which every process inherits, so that it holds until the last of them has ended.
    """
    stop.act_at_once(None)
    heartbeat.clear(run)
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)  # the ranks meet there
    shared = {threads.VARIABLE: str(max(threads.cpu_count() // count, 1)), **os.environ}
    command = [sys.executable, "-m", str(__package__), *arguments]  # by the name that it goes by here
    ranks: list[subprocess.Popen[bytes]] = []
    stop.hurry = lambda: _kill(ranks)
    for rank in range(count):
        environment = shared | environment_of(rank, count, store.port, os.getpid())
        ranks.append(subprocess.Popen(command, env=environment, pass_fds=[held.fileno()]))
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


def environment_of(rank: int, count: int, port: int, launcher: int) -> dict[str, str]:
    """What tells one of `count` ranks on this machine who it is, and where they meet. `launcher`: the process id of
    what starts them."""
    numbers = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {LAUNCHER: str(launcher), "MASTER_ADDR": LOOPBACK, **{name: str(value) for name, value in numbers.items()}}


def stopped_early(run: Path, request: str) -> str:
    """The line of a job that was asked to stop before its first step."""
    return f"stopped by {request} before the first step of this job; go on with --resume {run}"


def leave(status: int) -> NoReturn:
    """End a rank's process at once, without the interpreter's own end. Gloo's threads may still be releasing the
    tensors of collectives that are over; one that needs the interpreter for it while that is ending aborts the process:
    exit status -6 after all is done and saved (in 7 of 57 jobs on a busy machine; ZeRO-3, torch 2.13, Python 3.11)."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _follow(ranks: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """The exit statuses of the ranks once all have ended, or of those that ended by themselves up to the first failure,
    after which the others are killed: they may wait for the lost one forever."""
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
    places = [str(place) for place in heartbeat.read(run)]
    say(
        f"error: rank {rank} was the first to fail ({how}, exit status {status}), and the job was ended. "
        f"Last seen: {'; '.join(places) or 'nothing'}. Go on from the last checkpoint with --resume {run}"
    )
    return status if status > 0 else 1


def _first_to_fail(statuses: dict[int, int]) -> tuple[int, int]:
    """The rank whose failure the others followed, of those that ended within one look, and its exit status: one that a
    signal killed comes before those that noticed and ended."""
    return min(statuses.items(), key=lambda entry: (entry[1] >= 0, entry[0]))


def on_gpu(options: JobOptions) -> bool:
    """Whether the job runs on GPUs. Raises ConfigError where it is to, and there is none."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("job.device='cuda', but torch sees no GPU; use job.device=cpu, or auto")
    return options.device != "cpu" and torch.cuda.is_available()
