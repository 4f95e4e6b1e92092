"""Where every rank is, in one small file each, so that whoever survives a failure can say who did not.

``<run>/ranks/<rank>.json`` holds the rank's process id, its step, what it is doing, how often it moved on, and when it
was last alive. A thread writes it once a second; the same thread ends the process when the whole job stands still for
longer than the phase's budget. It alone bounds waits: the process group's own time-out cannot tell a rank that waits
for a long evaluation from one that waits for a dead rank, and it does not cover a stuck disk or a library's own group.
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

from train.config import Job

FOLDER = "ranks"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 3 * BEAT_SECONDS  # without a sign of life: dead, stopped, or its node is gone
SET_UP, FAILED = "set-up", "failed"


@dataclass(frozen=True)
class Place:
    """``phase``: set-up, training, evaluation, saving, done, or failed. ``moves``: so often it went on. ``alive``:
    seconds since 1970."""

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


class Progress:
    """This rank's file, and the watch over the job. ``enter`` is called at every change, ``tick`` on the way."""

    def __init__(self, run: Path, rank: int, budgets: Job) -> None:
        self._run, self._budgets = run, budgets
        self._place = Place(rank, os.getpid(), 0, SET_UP, 0, time.time())
        self._moved = time.monotonic()
        self._others: dict[int, int] | None = None  # their moves, as last seen by a rank that stands still
        self._writable, self._said = True, False
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
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
        """It goes on: one more chunk, file or stage is done."""
        self._place = replace(self._place, moves=self._place.moves + 1)
        self._moved, self._others = time.monotonic(), None

    def fail(self, message: str) -> None:
        """Say what went wrong here, and where the others are."""
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
                os._exit(1)  # the main thread is stuck, perhaps for ever

    def _look(self) -> None:
        """Another rank that moves is one to wait for: rank 0 evaluates and saves for all. Not looked for while this
        one moves itself: thousands of ranks would read one another's files every second."""
        seen = {place.rank: place.moves for place in read(self._run) if place.phase != FAILED}
        seen.pop(self._place.rank, None)
        known = self._others
        if known is None or any(rank in known and known[rank] != moves for rank, moves in seen.items()):
            self._moved = time.monotonic()
        self._others = seen

    def _write(self) -> None:
        """A heartbeat is for messages and waits; where none can be written, that is said once, and the run goes on."""
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


_own: Progress | None = None


def begin(run: Path, rank: int, budgets: Job) -> Progress:
    """This process's Progress."""
    global _own
    _own = Progress(run, rank, budgets)
    return _own


def tick() -> None:
    """Whatever this process does goes on. For code that also runs outside of a job, where nobody watches."""
    if _own is not None:
        _own.tick()


def clear(run: Path) -> None:
    """Forget an earlier job's ranks."""
    for path in (run / FOLDER).glob("*.json"):
        path.unlink(missing_ok=True)


def read(run: Path) -> list[Place]:
    """Every rank's last known place, by rank."""
    places = []
    for path in (run / FOLDER).glob("*.json"):
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            places.append(Place(**fields))
        except (OSError, ValueError, TypeError):
            continue  # it is being replaced
    return sorted(places, key=lambda place: place.rank)
