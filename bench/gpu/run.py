"""Performs the steps, each in another process, and records every row as it comes."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import Row
from ..gpu_tools.breakdown import PHASES, REST
from ..records import Record, table
from ..short_run import Failed, Worker
from ..timing import nvidia_smi
from . import compilation
from .goals import COMPILED, EAGER, MEMORY, MIB
from .plan import Scale, Step
from .rivals import RIVALS

LABELS = ("kind", "loss", "dtype", "n", "d", "candidate")
NO_TIME = "no time left"
SHOWN = 8  # tests that did not pass
MUST = ("smoke", "compilation", "correctness", "tests")  # a run that had no time to check the kernels has failed
SUMMARY = {  # what is printed last, by kind; the record has all
    "speed": (
        "fused",
        "TFLOP/s",
        "gemm TFLOP/s",
        "share of gemm",
        "share of gemm at equal clock",
        "over hard",
        f"over {EAGER}",
    ),
    "compiled": ("fused", f"over {COMPILED}"),
    "breakdown": ("wall ms", "gaps ms", "host ms", "launches", *(f"{phase} ms" for phase in (*PHASES, REST))),
    "rivals": ("fused", *(f"over {rival}" for rival in RIVALS)),
    "memory": ("MiB beyond inputs and gradients", f"with {MIB}={MEMORY[0] // 2**20}", "MiB allowed then"),
    "million": ("seconds",),
    "first call": ("first call s", "second call s"),
}


class Run:
    """Performs steps within a time, and records every row as it comes."""

    def __init__(self, options: argparse.Namespace, scale: Scale) -> None:
        self._end = time.monotonic() + 60 * options.minutes
        self._scale, self._forced = scale.forcing(options.candidate), options.candidate
        self._tiles = tempfile.TemporaryDirectory()  # empty: every candidate is timed in this run, for its record
        self._worker = self._new_worker(self._tiles.name)
        self._wrong: set[tuple[int, int]] = set()  # sizes at which the hard loss is no measure for the others
        self.record = Record("gpu", scale.device, LABELS, options.results)
        self.rows: list[Row] = []

    def _new_worker(self, tiles: str, **environment: str) -> Worker:
        return Worker(self._scale.prepare, {**self._scale.environment, "XDG_CACHE_HOME": tiles, **environment})

    def add(self, row: Row) -> None:
        if self._forced:
            row = row | {"candidate": self._forced}
        self.rows.append(row)
        self.record.add([row], replace=row.get("outcome") != NO_TIME)

    def left(self) -> float:
        return self._end - time.monotonic()

    def perform(self, step: Step) -> None:
        start, labels = time.monotonic(), step.labels()
        try:
            row = labels | self._outcome(step)
        except Exception as error:
            line = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            row = labels | {"passed": False, "error": line, "details": getattr(error, "details", "")}
            if step.kind == "speed" and step.case and step.case.loss == "hard":
                self._wrong.add((step.case.n, step.case.d))
        self.add(row | {"step s": time.monotonic() - start})
        done = row.get("error") or row.get("outcome") or "done"
        print(f"{_label(row)}: {done}, {self.left():.0f} s left", flush=True)
        for line in _test_lines(row):
            print(f"  {line}", flush=True)
        if suspects := row.get("kept from the tuner"):
            self._worker.end()
            prepare = functools.partial(compilation.keep_from_tuner, suspects, self._scale.prepare)
            self._scale = replace(self._scale, prepare=prepare)
            self._worker = self._new_worker(self._tiles.name)

    def _outcome(self, step: Step) -> Row:
        left = self.left()
        if left < step.estimate:
            skipped: Row = {"outcome": NO_TIME, "estimate s": step.estimate}
            return skipped | ({"passed": False} if step.kind in MUST else {})
        seconds = min(self._scale.patience * (2 * step.estimate + 30), left)
        if step.place == "here":
            return step.function(**step.arguments, seconds=seconds)
        arguments = step.arguments | {"case": step.case}
        if "with_hard" in arguments and step.case and (step.case.n, step.case.d) in self._wrong:
            arguments["with_hard"] = False
        if step.place == "worker":
            return self._worker.call(step.function, arguments, seconds)
        with tempfile.TemporaryDirectory() as cache:
            worker = self._new_worker(cache, TRITON_CACHE_DIR=cache)
            try:
                return worker.call(step.function, arguments, seconds)
            finally:
                worker.end()

    def finish(self) -> int:
        """The exit code, after the plot and a summary."""
        self._worker.end()
        self._tiles.cleanup()
        for kind, columns in SUMMARY.items():
            lines = [flat(row) for row in self.rows if row["kind"] == kind and columns[0] in flat(row)]
            shown = [key for key in (*LABELS, *columns) if any(key in line for line in lines)]
            if lines:
                print(table([{key: line.get(key) for key in shown} for line in lines]))
        measured = [row for row in self.rows if row["kind"] == "speed" and "share of gemm" in row]
        if measured:
            plot(measured, self.record.path.with_suffix(".png"))
        if tuned := [line for row in self.rows for line in tuning_lines(row.get("tuning", {}))]:
            print(table(tuned))
        failed = [_label(row) for row in self.rows if row.get("passed") is False]
        skipped = [_label(row) for row in self.rows if row.get("outcome") == NO_TIME]
        missed = [
            f"{_label(row)}: {goal}"
            for row in self.rows
            for goal, reached in row.get("goals", {}).items()
            if not reached
        ]
        for what, which in (("goals missed", missed), ("no time left for", skipped), ("FAILED", failed)):
            print(f"{what}: {'; '.join(which) or 'none'}")
        print(self.record.path)
        return 1 if failed else 0


def tuning_lines(measurements: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Of every choice of the tuner, its candidates' picoseconds an entry of the matrix, the chosen one first."""
    for key, measured in measurements.items():
        times = sorted(measured["ps an entry"].items(), key=lambda one: one[1])
        others = [f"{name} {time:.3g}" for name, time in times] + [f"{name} left out" for name in measured["left out"]]
        yield {"kernel and problem": key, "candidates, ps an entry": ", ".join(others)}


def flat(row: Row) -> Row:
    """What has a place in a table: the rest is in the record. Milliseconds of phases are spread."""
    kept = {key: value for key, value in row.items() if not isinstance(value, dict) and key != "details"}
    return kept | {f"{phase} ms": ms for phase, ms in row.get("phases", {}).items()}


def _test_lines(row: Row) -> Iterator[str]:
    """Of tests that did not pass, a few with what they say, and why there were none."""
    for failure in row.get("failures", ())[:SHOWN]:
        lines = failure["message"].strip().splitlines() or [""]
        raised = [line for line in lines if line.startswith("E ")] or lines
        yield f"{failure['test'].partition('::')[2]}: {raised[0]}"
    for problem in row.get("problems", ()):
        yield problem.partition("\n")[0]


def _label(row: Row) -> str:
    return " ".join(str(row[key]) for key in LABELS if key in row)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Share of the GEMM rate over N. Nothing where matplotlib is not installed; the record holds the same."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for loss, d in sorted({(row["loss"], row["d"]) for row in rows}):
        line = sorted((row["n"], row["share of gemm"]) for row in rows if (row["loss"], row["d"]) == (loss, d))
        axes.plot(*zip(*line, strict=True), marker="o", label=f"{loss}, D = {d}")
    axes.set(xscale="log", xlabel="N", ylabel="share of the matrix multiplication rate", ylim=(0, None))
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def device_row() -> Row:
    """Driver and limits; the clocks under load stand in the timed rows."""
    fields = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    import triton  # not by its distribution's name, which is not the same everywhere

    versions = {"triton": triton.__version__, "cuda": torch.version.cuda}
    return {"kind": "device"} | versions | nvidia_smi(fields)
