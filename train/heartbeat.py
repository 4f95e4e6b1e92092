"""Each rank's heartbeat, one small file that says where it is, so that those that survive a failure can name those that
did not; and the watch over the whole job.

`<run>/ranks/<rank>.json` holds the rank's process id, its step, what it is doing, how often it moved on, and when it
was last alive. A thread writes it once a second; the same thread ends the process when the whole job stands still for
longer than the phase's budget. Nothing else bounds waits: the process group's own time-out cannot tell a rank that
waits for a long evaluation from one that waits for a dead rank, and it does not cover a stuck disk or a library's own
group.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .config import JobOptions

FOLDER = "ranks"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 3 * BEAT_SECONDS  # without a sign of life: dead, stopped, or its node is gone
SET_UP, FAILED = "set-up", "failed"


@dataclass(frozen=True)
class Place:
    """Where a rank was last seen.

    phase  set-up, training, evaluation, saving, done, or failed
    moves  how often it moved on
    alive  when it was last alive, in seconds since 1970
    """

    rank: int
    pid: int
    step: int
    phase: str
    moves: int
    alive: float

    def __str__(self) -> str:
        silent = time.time() - self.alive
        quiet = f", silent for {silent:.0f} s" if silent > SILENT_SECONDS and self.phase != FAILED else ""
        return f"rank {self.rank}: step {self.step}, {self.phase}{quiet}"


class Heartbeat:
    """This rank's file, and the watch over the job. `enter` is called at every change of phase or step, `tick` between
    them."""

    def __init__(self, run: Path, rank: int, budgets: JobOptions) -> None:
        self._run, self._budgets = run, budgets
        self._place = Place(rank, os.getpid(), 0, SET_UP, 0, time.time())
        self._moved = time.monotonic()
        self._others: dict[int, int] | None = None  # their moves, as last seen by a rank that stands still
        self._writable, self._said = True, False
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def rank(self) -> int:
        return self._place.rank

    @property
    def phase(self) -> str:
        return self._place.phase

    def enter(self, step: int, phase: str) -> None:
        self._place = replace(self._place, step=step, phase=phase)
        self.tick()
        self._write()

    def tick(self) -> None:
        """Note that this rank moves: one more chunk, file or stage is done."""
        self._place = replace(self._place, moves=self._place.moves + 1)
        self._moved, self._others = time.monotonic(), None

    def fail(self, message: str) -> None:
        """Print what went wrong here, and where the others are."""
        step, phase = self._place.step, self._place.phase
        self.enter(step, FAILED)
        others = [str(place) for place in read(self._run) if place.rank != self._place.rank]
        where = f" Last seen: {'; '.join(others)}." if others else ""
        print(f"error: rank {self._place.rank}, step {step}, {phase}: {message}.{where}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            self._write()
            # Without heartbeats nobody sees rank 0 at the long work that it does for all; it watches itself.
            if self.phase == FAILED or not (self._writable or self.rank == 0):
                continue
            option = "setup_timeout_seconds" if self.phase == SET_UP else "timeout_seconds"
            budget = getattr(self._budgets, option)
            if time.monotonic() - self._moved > budget / 10:
                self._look()
            still = time.monotonic() - self._moved
            if still > budget:
                self.fail(f"no progress of any rank for {still:.0f} s (job.{option}={budget})")
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)  # the main thread is stuck, perhaps forever

    def _look(self) -> None:
        """Wait on where another rank moves: rank 0 evaluates and saves for all. Nobody looks while it moves itself, or
        thousands of ranks would read one another's files every second."""
        seen = {place.rank: place.moves for place in read(self._run) if place.phase != FAILED}
        seen.pop(self._place.rank, None)
        known = self._others
        if known is None or any(rank in known and known[rank] != moves for rank, moves in seen.items()):
            self._moved = time.monotonic()
        self._others = seen

    def _write(self) -> None:
        """A heartbeat serves messages and waits only: where it cannot be written, that is said once, and the run goes
        on."""
        if self.phase == SET_UP and not self._run.exists():
            return  # rank 0 is about to make it
        path = self._run / FOLDER / f"{self._place.rank}.json"
        scratch = path.with_suffix(".tmp")
        with self._lock:
            try:
                path.parent.mkdir(exist_ok=True)
                scratch.write_text(json.dumps({**asdict(self._place), "alive": time.time()}), encoding="utf-8")
                scratch.replace(path)
                self._writable = True
            except OSError as error:
                self._writable = False
                if not self._said:
                    self._said = True
                    print(
                        f"warning: rank {self._place.rank}: no heartbeat can be written to {path} ({error.strerror}); "
                        "the run goes on, but others cannot see where this rank is",
                        file=sys.stderr,
                        flush=True,
                    )


_of_this_process: Heartbeat | None = None


def begin(run: Path, rank: int, budgets: JobOptions) -> Heartbeat:
    """Start this process's heartbeat. `budgets`: how long the job may stand still in each phase."""
    global _of_this_process
    _of_this_process = Heartbeat(run, rank, budgets)
    return _of_this_process


def tick() -> None:
    """Note that this process moves. For code that also runs outside of a job, where nobody watches."""
    if _of_this_process is not None:
        _of_this_process.tick()


def clear(run: Path) -> None:
    """Remove the files of an earlier job's ranks."""
    for path in (run / FOLDER).glob("*.json"):
        path.unlink(missing_ok=True)


def read(run: Path) -> list[Place]:
    """Every rank's last known place, in the order of ranks."""
    places = []
    for path in (run / FOLDER).glob("*.json"):
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            places.append(Place(**fields))
        except (OSError, ValueError, TypeError):
            continue  # it is being replaced
    return sorted(places, key=lambda place: place.rank)
