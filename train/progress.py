"""Where every rank is, in one small file each, so that whoever survives a failure can say who did not.

``<run>/ranks/<rank>.json`` holds the rank's process id, its step, what it is doing, and when it was last alive. A
thread writes it once a second; the same thread ends the process when its work stands still for longer than the
time-out. That covers waits that no collective's own time-out covers: a stuck disk, a library's own process group.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "ranks"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 3 * BEAT_SECONDS  # without a sign of life: dead, stopped, or its node is gone
FAILED = "failed"


@dataclass(frozen=True)
class Place:
    """``phase``: set-up, training, evaluation, saving, done, or failed. ``alive``: seconds since 1970."""

    rank: int
    pid: int
    step: int
    phase: str
    alive: float

    def __str__(self) -> str:
        silent = time.time() - self.alive
        quiet = f", silent for {silent:.0f} s" if silent > SILENT_SECONDS and self.phase != FAILED else ""
        return f"rank {self.rank}: step {self.step}, {self.phase}{quiet}"


class Progress:
    """This rank's file, and the watch over it. ``enter`` is called at every change. Set-up is not watched, since data
    may be fetched then."""

    def __init__(self, run: Path, rank: int, timeout_seconds: float) -> None:
        self._folder = run / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._timeout = timeout_seconds
        self._place = Place(rank, os.getpid(), 0, "set-up", time.time())
        self._moved = time.monotonic()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._thread.start()

    def enter(self, step: int, phase: str) -> None:
        self._moved = time.monotonic()
        self._place = Place(self._place.rank, self._place.pid, step, phase, time.time())
        self._write()

    def fail(self, message: str) -> None:
        """Say what went wrong here, and where the others are."""
        step, phase = self._place.step, self._place.phase
        self.enter(step, FAILED)
        others = [str(place) for place in read(self._folder.parent) if place.rank != self._place.rank]
        where = f" Last seen: {'; '.join(others)}." if others else ""
        print(f"error: rank {self._place.rank}, step {step}, {phase}: {message}.{where}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            self._write()
            still = time.monotonic() - self._moved
            if still > self._timeout and self._place.phase not in ("set-up", FAILED):
                self.fail(f"no progress for {still:.0f} s (job.timeout_seconds={self._timeout:g})")
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)  # the main thread is stuck, perhaps for ever

    def _write(self) -> None:
        with self._lock:
            path = self._folder / f"{self._place.rank}.json"
            scratch = path.with_suffix(".tmp")
            scratch.write_text(json.dumps({**asdict(self._place), "alive": time.time()}), encoding="utf-8")
            scratch.replace(path)


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
