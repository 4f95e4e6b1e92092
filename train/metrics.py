"""What a run writes as it goes: a JSON line and TensorBoard scalars a step, a progress bar, and a plot at the end. Only
rank 0 has a Log.
"""

from __future__ import annotations

import io
import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .files import explain, write_atomically

METRICS, EVENTS, NONFINITE, PLOT = "metrics.jsonl", "tensorboard", "nonfinite.jsonl", "curves.png"
BAR = ("loss", "alpha", "scale", "r1_image_to_text")
BAR_SECONDS = {True: 1.0, False: 30.0}  # between updates on a terminal, and in a file, where each is a line more


class Log:
    """Appends rows from step `start` on; rows of later steps, which a crash left behind the checkpoint, are removed
    first. `bad_samples`: how many were left out of the training data, for the bar and every step's row."""

    def __init__(self, run: Path, start: int, steps: int, bad_samples: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._bad_samples = run, bad_samples
        for name in (METRICS, NONFINITE):
            _keep_before(run / name, start)
        self._files = {name: _Lines(run / name) for name in (METRICS, NONFINITE)}
        self._lost: set[str] = set()
        _end_threads_quietly()
        self._events: SummaryWriter | None = SummaryWriter(str(run / EVENTS), purge_step=start)
        # tqdm's monitor redraws a bar that is older than maxinterval.
        seconds = BAR_SECONDS[sys.stderr.isatty()]
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=seconds,
            maxinterval=seconds,
        )

    def row(self, step: int, values: dict[str, float]) -> None:
        """Write numbers that belong to a step. JSON knows no NaN and no infinity: they are written as null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(METRICS, {"step": step, **finite})
        try:
            for name, value in values.items():
                if self._events is not None:
                    self._events.add_scalar(name, value, step)
        except OSError as error:  # its thread has ended
            self._events = None
            self._complain(EVENTS, error, "its curves end here")

    def step(self, step: int, values: dict[str, float]) -> None:
        """A row, and one step on the progress bar."""
        self.row(step, {**values, "bad_samples": self._bad_samples})
        shown = {name: f"{values[name]:.3f}" for name in BAR}
        self._bar.set_postfix(
            shown | ({"bad_samples": str(self._bad_samples)} if self._bad_samples else {}), refresh=False
        )
        self._bar.update()

    def nonfinite(self, step: int, keys: tuple[str, ...]) -> None:
        """Name the samples of a batch that was skipped."""
        self._append(NONFINITE, {"step": step, "keys": keys})

    def say(self, text: str) -> None:
        self._bar.write(text)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """Append a row. A log that cannot be written ends no run: its rows wait for room."""
        try:
            self._files[name].append(json.dumps(row))
        except OSError as error:
            self._complain(name, error, "its rows wait for room, and the run goes on")

    def _complain(self, name: str, error: OSError, consequence: str) -> None:
        """Warn, once for each log."""
        if name not in self._lost:
            self._lost.add(name)
            error.filename = error.filename or str(self._run / name)
            self.say(f"warning: {name} cannot be written ({explain(error)}): {consequence}")

    def close(self) -> None:
        self._bar.close()
        try:
            if self._events is not None:
                self._events.close()
        except OSError as error:
            self._complain(EVENTS, error, "its curves lack their end")
        for file in self._files.values():
            file.close()


class _Lines:
    """A file that lines are appended to. Lines that the disk did not take are written before the next, whole and in
    order."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, b""
        self._file: io.FileIO | None = None

    def append(self, line: str) -> None:
        """Raises OSError where the line does not reach the file now; it waits for the next call."""
        self._waiting += f"{line}\n".encode()
        if self._file is None:
            self._file = io.FileIO(self._path, "a")
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


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


def plot(run: Path) -> Path:
    """Loss, α and R@1 over the steps as a PNG; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(run / METRICS)
    trained = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in trained]
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    upper.plot(steps, _column(trained, "loss"), color="tab:blue", label="loss")
    upper.set_ylabel("loss")
    share = upper.twinx()
    share.plot(steps, _column(trained, "alpha"), color="tab:orange", label="α (soft share)")
    share.set(ylabel="α", ylim=(0, 1))
    upper.legend(handles=[*upper.lines, *share.lines], loc="upper right")
    lower.plot(steps, _column(trained, "r1_image_to_text"), label="in batch, image → text", alpha=0.7)
    lower.plot(steps, _column(trained, "r1_text_to_image"), label="in batch, text → image", alpha=0.7)
    for name, label in (("heldout_r1_image_to_text", "image → text"), ("heldout_r1_text_to_image", "text → image")):
        points = [(row["step"] + 1, row[name]) for row in rows if name in row]
        if points:
            lower.plot(*zip(*points, strict=True), marker="o", label=f"held out, {label}")
    lower.set(xlabel="step", ylabel="R@1", ylim=(0, 1))
    lower.legend(loc="upper left")
    figure.suptitle(run.name)
    figure.savefig(run / PLOT, dpi=120)
    pyplot.close(figure)
    return run / PLOT


def _column(rows: list[dict[str, Any]], name: str) -> list[float]:
    values = (row.get(name) for row in rows)
    return [value if isinstance(value, (int, float)) else math.nan for value in values]
