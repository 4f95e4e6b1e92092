"""The Triton kernels on a GPU: correctness first, then speed and memory, in one run of at most nine minutes.

python -m bench gpu                     everything; rows go to bench/results/gpu/, with a plot beside them
python -m bench gpu --n 32768 --d 512   some sizes

A run is a list of steps (`plan`), most important first. Each runs in another process (short_run) with a limit of its
own; one that fails is recorded with its error, one for which no time is left as such, and the run goes on. The record
is written after every step. Exit code 1: something failed; 2: no CUDA device or no triton.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch

from . import ROOT, Row, triton
from .problems import LOSSES, Case
from .records import Record, table
from .short_run import Failed, Worker, run_tests
from .timing import nvidia_smi

SIZES = (4096, 16384, 32768, 65536, 131072)
WIDTHS = (512, 768, 1024)
SUITE = ROOT / "tests" / "backends" / "test_triton_gpu.py"
LABELS = ("kind", "loss", "dtype", "n", "d")
CANNOT_RUN = 2  # exit code
NO_TIME = "no time left"


@dataclass(frozen=True)
class Scale:
    """How large the steps are. Those of a GPU; tests take smaller ones, without a GPU (`device` "cpu")."""

    device: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)  # the first is the one timed
    n: tuple[int, ...] = SIZES
    d: tuple[int, ...] = WIDTHS
    first: tuple[int, int] = triton.GOAL_SIZE  # the size that is timed first
    checked: tuple[int, int] = (1000, 96)
    repeats: int = 250
    memory: tuple[int, int] = (16384, 512)
    million: tuple[int, int] = (1 << 20, 512)
    first_call: tuple[int, int] = (4096, 512)
    seconds: float = 1.0  # of every timing, at least
    patience: float = 1.0  # how much longer than on an H100 a step may take
    gemm: int = 8192  # edge of the matrix products


@dataclass(frozen=True)
class Step:
    """A row of the record. `estimate` is of an H100, in seconds.

    place    "worker": in a process that lives as long as nothing breaks it; "fresh": in one with empty caches; "here":
             as what starts processes of its own and is told how many seconds they have
    """

    kind: str
    case: Case | None
    estimate: float
    function: Callable[..., Row]
    arguments: Row = field(default_factory=dict)
    place: str = "worker"

    def labels(self) -> Row:
        return {"kind": self.kind, **(self.case.labels() if self.case else {})}


def plan(options: argparse.Namespace, scale: Scale) -> Iterator[Step]:
    """Correctness, the size of the goals, memory, a million rows, the first call, the other sizes."""

    def case(size: tuple[int, int], loss: str = "hard", dtype: torch.dtype = scale.dtypes[0]) -> Case:
        return Case(loss, dtype, *size, scale.device)

    def speed(size: tuple[int, int], loss: str, kind: str = "speed") -> Step:
        rivals = triton.RIVALS[loss] if kind == "speed" else (triton.COMPILED,)
        seconds = scale.seconds if size == scale.first else scale.seconds / 2
        arguments = {"rivals": rivals, "with_hard": True, "rounds": options.rounds, "seconds": seconds}
        estimate = triton.estimate(case(size, loss), options.rounds, kind == "compiled")
        return Step(kind, case(size, loss), estimate, triton.speed, arguments | {"gemm": scale.gemm})

    for dtype, loss in product(scale.dtypes, LOSSES):
        yield Step("correctness", case(scale.checked, loss, dtype), 5, triton.correctness, {"repeats": scale.repeats})
    if not options.no_tests:
        yield Step("tests", None, 80, run_tests, {"suite": options.suite}, "here")
    sizes = [(n, d) for d in options.d for n in options.n]
    if scale.first in sizes:
        sizes.remove(scale.first)
        yield from (speed(scale.first, loss) for loss in LOSSES)
        yield from (speed(scale.first, loss, "compiled") for loss in LOSSES if not options.no_compile)
    for loss, dtype in product(LOSSES, dict.fromkeys((scale.dtypes[0], torch.float32))):
        yield Step("memory", case(scale.memory, loss, dtype), 3, triton.memory)
    yield Step("million", case(scale.million), 15, triton.million)
    yield Step("first call", case(scale.first_call), 20, triton.first_call, place="fresh")
    yield from (speed(size, loss) for size, loss in product(sizes, LOSSES))


class Run:
    """Performs steps within a time, and records every row as it comes. `prepare` readies every worker process."""

    def __init__(self, options: argparse.Namespace, scale: Scale, prepare: Callable[[], object] | None = None) -> None:
        self._end = time.monotonic() + 60 * options.minutes
        self._worker, self._prepare, self._scale = Worker(prepare), prepare, scale
        self._wrong: set[tuple[int, int]] = set()  # sizes at which the hard loss is no measure for the others
        self.record = Record("gpu", scale.device, LABELS, options.results)
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
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

    def _outcome(self, step: Step) -> Row:
        left = self.left()
        if left < step.estimate:
            skipped: Row = {"outcome": NO_TIME, "estimate s": step.estimate}
            return skipped | ({"passed": False} if step.kind in ("correctness", "tests") else {})
        seconds = min(self._scale.patience * (2 * step.estimate + 30), left)
        if step.place == "here":
            return step.function(**step.arguments, seconds=seconds)
        arguments = step.arguments | {"case": step.case}
        if "with_hard" in arguments and step.case and (step.case.n, step.case.d) in self._wrong:
            arguments["with_hard"] = False
        if step.place == "worker":
            return self._worker.call(step.function, arguments, seconds)
        with tempfile.TemporaryDirectory() as cache:
            worker = Worker(self._prepare, {"TRITON_CACHE_DIR": cache, "XDG_CACHE_HOME": cache})
            try:
                return worker.call(step.function, arguments, seconds)
            finally:
                worker.end()

    def finish(self) -> int:
        """The exit code, after the plot and a summary."""
        self._worker.end()
        measured = [row for row in self.rows if row["kind"] == "speed" and "share of gemm" in row]
        if measured:
            columns = ("loss", "n", "d", "fused", "TFLOP/s", "gemm TFLOP/s", "share of gemm")
            print(table([{key: row[key] for key in columns} for row in measured]))
            plot(measured, self.record.path.with_suffix(".png"))
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
    versions = {"triton": importlib.metadata.version("triton"), "cuda": torch.version.cuda}
    return {"kind": "device"} | versions | nvidia_smi(fields)


def parse(arguments: Sequence[str], scale: Scale) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=scale.n, help=f"batch sizes (default: {scale.n})")
    parser.add_argument("--d", type=int, nargs="+", default=scale.d, help=f"embedding widths (default: {scale.d})")
    parser.add_argument("--rounds", type=int, default=7, help="of a timing, at least (default: 7)")
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole run (default: 8.5)")
    parser.add_argument("--suite", type=Path, default=SUITE, help="the tests (default: test_triton_gpu.py)")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--results", type=Path, help="the folder of records (default: bench/results/)")
    options = parser.parse_args(arguments)
    if min(*options.n, *options.d, options.rounds) < 1:
        parser.error(f"--n {options.n}, --d {options.d} and --rounds {options.rounds} must be at least 1")
    return options


def run(options: argparse.Namespace, scale: Scale, prepare: Callable[[], object] | None = None) -> int:
    """The exit code of a whole run."""
    steps = Run(options, scale, prepare)
    steps.add(device_row())
    for step in plan(options, scale):
        steps.perform(step)
    return steps.finish()


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments, Scale())
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: this benchmark needs it (pip install triton)", file=sys.stderr)
        raise SystemExit(CANNOT_RUN)
    if not torch.cuda.is_available():
        print("no CUDA device: this benchmark needs a GPU", file=sys.stderr)
        raise SystemExit(CANNOT_RUN)
    if code := run(options, Scale()):
        raise SystemExit(code)
