"""Processes side by side, of which each may fail alone."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..signals import stop

LOOK_SECONDS = 0.1  # between two looks at them


@dataclass(frozen=True)
class Job:
    """A command, and the file that takes what it says."""

    name: str
    command: Sequence[str]
    log: Path


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit status (negative: the signal that ended it), and the seconds that it took, by the clock
    and on all processors, those of its own processes included."""

    status: int
    wall_seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    began: float


def carry_out(
    jobs: Sequence[Job],
    parallel: int,
    environment: Mapping[str, str],
    began: Callable[[Job], None],
    ended: Callable[[Job, Ended], None],
) -> None:
    """Start the jobs in order, `parallel` at a time, and tell of each when it begins and ends. Asked to stop (see
    signals), ask those that run to, wait for them, and start no more."""
    waiting, running, asked = list(jobs), list[_Running](), False
    stop.hurry = lambda: _kill(running)
    while running or (waiting and not stop.request):
        while waiting and len(running) < parallel and not stop.request:
            running.append(_start(waiting.pop(0), environment))
            began(running[-1].job)
        if stop.request and not asked:
            asked = True
            for one in running:  # never by SIGINT: a terminal's reaches them too, and a second one ends them at once
                one.process.terminate()
        time.sleep(LOOK_SECONDS)
        for one in list(running):
            pid, status, used = os.wait4(one.process.pid, os.WNOHANG)  # Popen's own does not tell the time it took
            if pid:
                running.remove(one)
                one.process.returncode = os.waitstatus_to_exitcode(status)
                seconds = time.monotonic() - one.began
                ended(one.job, Ended(one.process.returncode, seconds, used.ru_utime + used.ru_stime))


def _start(job: Job, environment: Mapping[str, str]) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            job.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    return _Running(job, process, time.monotonic())


def _kill(running: Sequence[_Running]) -> None:
    for one in running:
        one.process.kill()
