"""What a run writes as it goes: JSON lines, TensorBoard scalars, and the same to a tracker where one is asked for. Only
rank 0 has a Log.
"""

from __future__ import annotations

import io
import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import Bar
from .files import explain, write_atomically
from .tracker import Tracker

if TYPE_CHECKING:
    import torch

    from .config import Config

METRICS, EVENTS, NONFINITE = "metrics.jsonl", "tensorboard", "nonfinite.jsonl"
FLUSH_SECONDS = 1.0


class Log:
    """Appends rows from step `start` on; rows of later steps, which a crash left behind the checkpoint, are removed
    first. A write for each step of 20 ms would cost more than it tells, so rows go to the disk once a second, and where
    somebody will look: see `flush`. A process that is killed loses those of its last second.

    config  the run's, for the tracker that its job.report names; None: without one
    """

    def __init__(self, run: Path, start: int, steps: int, config: Config | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        for name in (METRICS, NONFINITE):
            _keep_before(run / name, start)
        self._files = {name: _Lines(run / name) for name in (METRICS, NONFINITE)}
        self._flushed = -math.inf
        self._lost: set[str] = set()
        _end_threads_quietly()
        self._events: SummaryWriter | None = SummaryWriter(str(run / EVENTS), purge_step=start)
        self._bar = Bar(start, steps)
        tracked = config is not None and config.job.report != "none"
        self._tracker = Tracker(config.job.report, run, config.to_dict(), self.say) if config and tracked else None

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers that belong to a step. JSON knows no NaN and no infinity: they are written as null."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._files[METRICS].append(json.dumps({"step": step, **dict.fromkeys(values), **finite}))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()
        try:
            if self._events is not None:
                _add_scalars(self._events, step, values)
        except OSError as error:  # its thread has ended
            self._events = None
            self._complain(EVENTS, error, "its curves end here")
        if self._tracker is not None:
            self._tracker.log(step, finite)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A row, and one step on the progress bar, which shows those of `values` that console names."""
        self.row(step, values)
        self._bar.step(values)

    def nonfinite(self, step: int, keys: tuple[str, ...]) -> None:
        """Name the samples of a batch that was skipped."""
        self._files[NONFINITE].append(json.dumps({"step": step, "keys": keys}))
        self.flush()

    def say(self, text: str) -> None:
        self.flush()
        self._bar.say(text)

    def flush(self) -> None:
        """Have all rows on the disk: before a checkpoint, whose steps no log may lack, and before a pause. A log that
        cannot be written ends no run: its rows wait for room."""
        self._flushed = time.monotonic()
        for name, file in self._files.items():
            try:
                file.flush()
            except OSError as error:
                self._complain(name, error, "its rows wait for room, and the run goes on")

    def _complain(self, name: str, error: OSError, consequence: str) -> None:
        """Warn, once for each log."""
        if name not in self._lost:
            self._lost.add(name)
            error.filename = error.filename or str(self._run / name)
            self._bar.say(f"warning: {name} cannot be written ({explain(error)}): {consequence}")

    def close(self) -> None:
        self.flush()
        self._bar.close()
        try:
            if self._events is not None:
                self._events.close()
        except OSError as error:
            self._complain(EVENTS, error, "its curves lack their end")
        for file in self._files.values():
            file.close()
        if self._tracker is not None:
            self._tracker.close()


class _Lines:
    """A file that lines are appended to. Lines that the disk did not take are written before the next, whole and in
    order."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, bytearray()
        self._file: io.FileIO | None = None

    def append(self, line: str) -> None:
        """Have the line wait for the next flush."""
        self._waiting += f"{line}\n".encode()

    def flush(self) -> None:
        """Raises OSError where the lines do not all reach the file now; those that are left wait for the next call."""
        if self._waiting and self._file is None:
            self._file = io.FileIO(self._path, "a")
        while self._waiting and self._file is not None:
            del self._waiting[: self._file.write(self._waiting)]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _add_scalars(events: Any, step: int, values: Mapping[str, float]) -> None:
    """What `events`, a SummaryWriter, does with add_scalar, but in one event: an eighth of the processor's time."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    events.file_writer.add_summary(Summary(value=scalars), step)


def _end_threads_quietly() -> None:
    """TensorBoard writes in a thread. Where a full disk ends it, the next row finds out and says so."""
    before = threading.excepthook

    def hook(ended: threading.ExceptHookArgs) -> None:
        if not isinstance(ended.exc_value, OSError):
            before(ended)

    threading.excepthook = hook


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that belong to a step; lines that a crash cut or somebody altered are left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def _keep_before(path: Path, start: int) -> None:
    kept = [row for row in read_rows(path) if row["step"] < start]
    if kept or path.exists():
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def memory_in_use(device: torch.device) -> int:
    """What this process takes of the memory that bounds its batch: on a GPU the most that tensors took so far, on a CPU
    what is resident now."""
    import psutil  # which DeepSpeed brings
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
