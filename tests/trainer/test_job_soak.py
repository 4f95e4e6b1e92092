"""A long run holds no more memory, handles and threads at its end than in its middle, seen from outside of its
processes; checkpoints, evaluations on the way and TensorBoard's events included."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
from helpers.jobs import configuration, finish, start

from train import heartbeat

STEPS = 2000
LAUNCHER = -1  # among the ranks: the process that started them
EARLY, LATE = (0.3, 0.45), (0.85, 1.0)  # shares of a run; before the first, caches and allocators fill
PATIENCE = 1500.0


@dataclass(frozen=True)
class Holdings:
    """What a process held when step `step` was the last seen to begin: memory in bytes, of the process alone."""

    step: int
    memory: int
    handles: int
    threads: int


def holdings(pid: int, step: int) -> Holdings | None:
    """None: the process is gone."""
    proc = Path(f"/proc/{pid}")
    try:
        lines = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        memory = int(lines["RssAnon"].split()[0]) * 1024  # pages of files come and go with the rest of the machine
        return Holdings(step, memory, len(list((proc / "fd").iterdir())), int(lines["Threads"]))
    except (OSError, KeyError):
        return None


def watch(job: subprocess.Popen[str], run: Path) -> dict[int, list[Holdings]]:
    """What each rank and the launcher hold, several times a second until the job ends."""
    seen: dict[int, list[Holdings]] = {}
    end = time.monotonic() + PATIENCE
    while job.poll() is None:
        assert time.monotonic() < end, f"not over after {PATIENCE:.0f} s: {heartbeat.read(run)}"
        places = heartbeat.read(run)
        pids = {place.rank: (place.pid, place.step) for place in places}
        if places:
            pids[LAUNCHER] = (job.pid, max(place.step for place in places))
        for rank, (pid, step) in pids.items():
            found = holdings(pid, step)
            if found is not None:
                seen.setdefault(rank, []).append(found)
        time.sleep(0.1)
    return seen


def growth(seen: list[Holdings], steps: int) -> dict[str, float]:
    """From the early window of the run's steps to the late. Medians, for an evaluation holds more while it lasts."""

    def typical(name: str, window: tuple[float, float]) -> float:
        return median(getattr(one, name) for one in seen if window[0] * steps <= one.step < window[1] * steps)

    return {name: typical(name, LATE) - typical(name, EARLY) for name in ("memory", "handles", "threads")}


def soak(data: Path, folder: Path, steps: int, fault: str = "") -> dict[int, dict[str, float]]:
    """Growth by rank over a whole job of two processes."""
    every = {"checkpoint_every": 50, "evaluate_every": 50, "timeout_seconds": 300}
    file = configuration(folder, data, steps=steps, **every)
    job = start("--config", str(file), "--folder", str(folder / "run"), fault=fault)
    seen = watch(job, folder / "run")
    status, said = finish(job)
    assert status == 0, said
    assert set(seen) == {LAUNCHER, 0, 1}
    return {rank: growth(ones, steps) for rank, ones in seen.items()}


# Measured over the 1,100 steps between the windows' middles: up to 0.5 kB a step, and neither a handle nor a
# thread. The bound on memory leaves room for an allocator on a machine with other work; it makes 2 MB of a default
# run of 420 steps.
ALLOWED_BYTES_PER_STEP = 5_000


def growing(grown: dict[str, float], steps: int) -> set[str]:
    between = (sum(LATE) - sum(EARLY)) / 2 * steps
    allowed = {"memory": ALLOWED_BYTES_PER_STEP * between, "handles": 0, "threads": 0}
    return {name for name, value in grown.items() if value > allowed[name]}


@pytest.mark.long
@pytest.mark.timeout(PATIENCE + 200)
def test_a_long_run_holds_no_more_at_its_end_than_in_its_middle(data: Path, tmp_path: Path) -> None:
    grown = soak(data, tmp_path, STEPS)
    print(grown)
    assert {rank: growing(one, STEPS) for rank, one in grown.items()} == {LAUNCHER: set(), 0: set(), 1: set()}


@pytest.mark.long
@pytest.mark.timeout(PATIENCE + 200)
def test_leaks_are_found_out(data: Path, tmp_path: Path) -> None:
    """A test of the test: ranks that lose a handle and 20 kB a step, and a thread every tenth."""
    steps = STEPS // 4
    grown = soak(data, tmp_path, steps, "leaks")
    everything = {"memory", "handles", "threads"}
    found = {rank: growing(one, steps) for rank, one in grown.items()}
    assert found == {LAUNCHER: set(), 0: everything, 1: everything}, grown
