"""Starts whole jobs of the trainer as users do, and follows them from outside."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from train import heartbeat, metrics
from train.data import workers

from . import PYTHONPATH, ROOT, signals
from .data import tiny

TIMEOUT = 120


def environment(fault: str = "") -> dict[str, str]:
    """That of a job. `fault`: the name of a function in faults/sitecustomize.py, for its ranks."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = PYTHONPATH
    if fault:
        path = os.pathsep.join((str(ROOT / "tests" / "helpers" / "faults"), path))
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TRAIN_FAULT": fault}


def start(*arguments: str, fault: str = "", launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`launcher`: a module and its options that start `python -m train`, in its place. Signals mean what they mean in a
    terminal, also where the tests run in the background, whose children would ignore SIGINT."""
    command = [sys.executable, *(("-m", *launcher) if launcher else ()), "-m", "train", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(fault),
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        preexec_fn=signals.restore,
    )


def start_in_terminal(*arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """The job, in the foreground of a terminal of its own, and the terminal's other end, which does not block."""
    ours, its = os.openpty()

    def take_over() -> None:
        signals.restore()
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)

    job = subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=take_over,
    )
    os.close(its)
    os.set_blocking(ours, False)
    return job, ours


def read_terminal(ours: int) -> str:
    """What was shown since the last time."""
    shown = b""
    with contextlib.suppress(OSError):  # nothing more at the moment, or at all
        while chunk := os.read(ours, 4096):
            shown += chunk
    return shown.decode(errors="replace")


def finish(job: subprocess.Popen[str], seconds: float = TIMEOUT) -> tuple[int, str]:
    """Exit status and everything said by a job that ends within so many seconds; whatever is left of its processes is
    an error, and ended."""
    try:
        said = "".join(job.communicate(timeout=seconds))
    finally:
        left = _outlive(job.pid)
    assert not left, "processes outlived the job"
    return job.returncode, said


def _outlive(job: int) -> bool:
    """Whether processes of a job that has ended are still there a moment later; they are ended. The data's workers see
    within LOOK_SECONDS that their rank is gone."""
    end = time.monotonic() + 3 * workers.LOOK_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(job, 0)
            time.sleep(0.02)
        os.killpg(job, signal.SIGKILL)
        return True
    return False


def configuration(
    folder: Path, data: Path, steps: int = 24, micro_batches: int = 1, data_workers: int = 0, **job: Any
) -> Path:
    sections = tiny(data, **job)
    sections["data"]["workers"] = data_workers
    sections["optimizer"] |= {"steps": steps, "micro_batches": micro_batches}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return folder / "tiny.yaml"


def wait_for(run: Path, rank: int, condition: Callable[[heartbeat.Place], bool]) -> heartbeat.Place:
    """The place of a rank once `condition` holds for it."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        for place in heartbeat.read(run):
            if place.rank == rank and condition(place):
                return place
        time.sleep(0.005)
    raise AssertionError(f"rank {rank} never came there; last seen: {heartbeat.read(run)}")


def steps_logged(run: Path) -> list[int]:
    return [row["step"] for row in metrics.read_rows(run / metrics.METRICS) if "loss" in row]


def training_rows(run: Path) -> list[dict[str, Any]]:
    """The logged numbers that depend on the training alone, not on the clock or the machine."""
    other = ("samples_per_second", "data_seconds", "step_seconds", "memory_bytes")
    rows = metrics.read_rows(run / metrics.METRICS)
    return [{name: value for name, value in row.items() if name not in other} for row in rows]
