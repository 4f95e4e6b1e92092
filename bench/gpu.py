"""The Triton kernels on a GPU: correctness first, then speed and memory, in one run of at most nine minutes.

python -m bench gpu                     everything; rows go to bench/results/gpu.json, a plot to bench/results/gpu.png
python -m bench gpu --n 32768 --d 512   some sizes
python -m bench gpu --interpret         a rehearsal on the CPU with tiny sizes, where TRITON_INTERPRET=1

A run is a list of steps (`plan`), most important first. Each runs in another process (gpu_process) with a limit of its
own; one that fails is recorded with its error, one for which no time is left as such, and the run goes on. The record
is written after every step. Exit code 1: something failed; 2: no CUDA device or no triton.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import common, gpu_checks, gpu_speed, gpu_tests, rehearsal
from .gpu_process import Failed, Worker

Row = dict[str, Any]
SIZES = (4096, 16384, 32768, 65536, 131072)
WIDTHS = (512, 768, 1024)
CANNOT_RUN = 2  # exit code


@dataclass(frozen=True)
class Scale:
    """How large the steps are: for a GPU, or for a rehearsal in the interpreter, which takes float32 only."""

    device: str
    dtypes: tuple[torch.dtype, ...]  # the first is the one that is timed
    n: tuple[int, ...]
    d: tuple[int, ...]
    first: tuple[int, int]  # the size that is timed first
    checked: tuple[int, int]
    repeats: int
    memory: tuple[int, int]
    million: tuple[int, int]
    first_call: tuple[int, int]
    seconds: float  # of every timing, at least
    patience: float  # how much longer than on an H100 a step may take
    gemm: int  # edge of the matrix products


GPU = Scale(
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    n=SIZES,
    d=WIDTHS,
    first=gpu_speed.GOAL_SIZE,
    checked=(1000, 96),
    repeats=250,
    memory=(16384, 512),
    million=(1 << 20, 512),
    first_call=(4096, 512),
    seconds=1.0,
    patience=1.0,
    gemm=8192,
)
REHEARSAL = Scale(
    device="cpu",
    dtypes=(torch.float32,),
    n=(64, 40),
    d=(32,),
    first=(64, 32),
    checked=(65, 24),
    repeats=2,
    memory=(64, 32),
    million=(40, 16),
    first_call=(40, 16),
    seconds=0.0,
    patience=10.0,
    gemm=32,
)


@dataclass(frozen=True)
class Step:
    """`labels` begin the row; `estimate` is of an H100, in seconds. `apart`: in the other process; else it starts
    processes of its own and is told how many seconds they have."""

    labels: Row
    estimate: float
    function: Callable[..., Row]
    arguments: Row
    apart: bool = True

    def limit(self) -> float:
        return 2 * self.estimate + 30

    def title(self) -> str:
        return " ".join(f"{key.upper()} = {value}" if key in "nd" else str(value) for key, value in self.labels.items())


def plan(options: argparse.Namespace, scale: Scale) -> Iterator[Step]:
    """Correctness, the size of the goals, memory, a million rows, the first call, the other sizes."""
    timed = scale.dtypes[0]

    def step(
        kind: str, estimate: float, function: Callable[..., Row], n: int, d: int, *, apart: bool = True, **more: Any
    ) -> Step:
        labels: Row = {"kind": kind, "loss": more.get("loss", "hard"), "n": n, "d": d}
        labels["dtype"] = gpu_checks.name(more.setdefault("dtype", timed))
        return Step(labels, estimate, function, {"n": n, "d": d, "device": scale.device} | more, apart)

    def speed(kind: str, n: int, d: int, loss: str, rivals: Sequence[str]) -> Step:
        estimate = gpu_speed.estimate(loss, n, d, options.rounds, gpu_speed.COMPILED in rivals)
        seconds = scale.seconds if (n, d) == scale.first else scale.seconds / 2
        more = {"rounds": options.rounds, "seconds": seconds, "gemm": scale.gemm}
        return step(kind, estimate, gpu_speed.speed, n, d, loss=loss, rivals=rivals, with_hard=True, **more)

    for dtype in scale.dtypes:
        for loss in common.LOSSES:
            more: Row = {"loss": loss, "repeats": scale.repeats}
            yield step("correctness", 5, gpu_checks.correctness, *scale.checked, dtype=dtype, **more)
    if not options.no_tests:
        yield Step({"kind": "tests"}, 80, gpu_tests.run, {"suite": options.suite}, apart=False)
    sizes = [(n, d) for d in options.d for n in options.n]
    if scale.first in sizes:
        sizes.remove(scale.first)
        for loss in common.LOSSES:
            yield speed("speed", *scale.first, loss, gpu_speed.RIVALS[loss])
        for loss in () if options.no_compile else common.LOSSES:
            yield speed("compiled", *scale.first, loss, (gpu_speed.COMPILED,))
    for loss in common.LOSSES:
        for dtype in dict.fromkeys((timed, torch.float32)):
            yield step("memory", 3, gpu_checks.memory, *scale.memory, loss=loss, dtype=dtype)
    yield step("million", 15, gpu_checks.million, *scale.million)
    yield step("first call", 20, gpu_checks.first_call, *scale.first_call, apart=False, loss="hard")
    for n, d in sizes:
        for loss in common.LOSSES:
            yield speed("speed", n, d, loss, gpu_speed.RIVALS[loss])


class Run:
    """Performs steps within a time, and writes every row as it comes."""

    def __init__(self, options: argparse.Namespace, scale: Scale) -> None:
        self._end = time.monotonic() + 60 * options.minutes
        self._worker = Worker(rehearsal.install if options.interpret else None)
        self._options, self._scale = options, scale
        self._wrong: set[tuple[int, int]] = set()  # sizes at which the hard loss is no measure for the others
        self.rows: list[Row] = []
        self.path = self.add(_device_row())

    def add(self, row: Row) -> Path:
        self.rows.append(row)
        return common.write(self._options.name, self._scale.device, self.rows, self._options.results)

    def left(self) -> float:
        return self._end - time.monotonic()

    def perform(self, step: Step) -> None:
        start = time.monotonic()
        try:
            row = step.labels | self._outcome(step)
        except Exception as error:
            line = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            row = step.labels | {"passed": False, "error": line, "details": getattr(error, "details", "")}
            if step.labels.get("loss") == "hard" and step.labels["kind"] == "speed":
                self._wrong.add((step.labels["n"], step.labels["d"]))
        self.add(row | {"step s": time.monotonic() - start})
        done = row.get("error") or row.get("outcome") or "done"
        print(f"{step.title()}: {done}, {self.left():.0f} s left", flush=True)

    def _outcome(self, step: Step) -> Row:
        left = self.left()
        if left < step.estimate:
            skipped: Row = {"outcome": "no time left", "estimate s": step.estimate}
            return skipped | ({"passed": False} if step.labels["kind"] in ("correctness", "tests") else {})
        seconds = min(self._scale.patience * step.limit(), left)
        if not step.apart:
            return step.function(**step.arguments, seconds=seconds)
        arguments = step.arguments
        if (arguments["n"], arguments["d"]) in self._wrong and "with_hard" in arguments:
            arguments = arguments | {"with_hard": False}
        return self._worker.call(step.function, arguments, seconds)

    def finish(self) -> int:
        """The exit code, after the plot and a summary."""
        self._worker.end()
        measured = [row for row in self.rows if row["kind"] == "speed" and "share of gemm" in row]
        if measured:
            columns = ("loss", "n", "d", "fused", "TFLOP/s", "gemm TFLOP/s", "share of gemm")
            print(common.table([{key: row[key] for key in columns} for row in measured]))
            plot(measured, self.path.with_suffix(".png"))
        failed = [_label(row) for row in self.rows if row.get("passed") is False]
        skipped = [_label(row) for row in self.rows if row.get("outcome") == "no time left"]
        missed = [
            f"{_label(row)}: {goal}"
            for row in self.rows
            for goal, reached in row.get("goals", {}).items()
            if not reached
        ]
        for what, which in (("goals missed", missed), ("no time left for", skipped), ("FAILED", failed)):
            print(f"{what}: {'; '.join(which) or 'none'}")
        print(self.path)
        return 1 if failed else 0


def _label(row: Row) -> str:
    return " ".join(str(row[key]) for key in ("kind", "loss", "dtype", "n", "d") if key in row)


def plot(rows: Sequence[Row], path: Path) -> Path | None:
    """Share of the GEMM rate over N. None where matplotlib is not installed; the record holds the same."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for loss, d in sorted({(row["loss"], row["d"]) for row in rows}):
        line = sorted((row["n"], row["share of gemm"]) for row in rows if (row["loss"], row["d"]) == (loss, d))
        axes.plot(*zip(*line, strict=True), marker="o", label=f"{loss}, D = {d}")
    axes.set(xscale="log", xlabel="N", ylabel="share of the matrix multiplication rate", ylim=(0, None))
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _device_row() -> Row:
    """Driver and limits; the clocks under load stand in the timed rows."""
    fields = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    versions = {"triton": importlib.metadata.version("triton"), "cuda": torch.version.cuda}
    return {"kind": "device"} | versions | gpu_speed.nvidia_smi(fields)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", help=f"batch sizes (default: {SIZES})")
    parser.add_argument("--d", type=int, nargs="+", help=f"embedding widths (default: {WIDTHS})")
    parser.add_argument("--rounds", type=int, default=7, help="of a timing, at least (default: 7)")
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole run (default: 8.5)")
    parser.add_argument("--suite", type=Path, default=gpu_tests.SUITE, help="the tests (default: test_triton_gpu.py)")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--interpret", action="store_true", help="rehearse on the CPU, where TRITON_INTERPRET=1")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="the record's folder (bench/results/)")
    parser.add_argument("--name", default="gpu", help="of the files in it")
    options = parser.parse_args(arguments)
    scale = REHEARSAL if options.interpret else GPU
    options.n, options.d = options.n or scale.n, options.d or scale.d
    if min(*options.n, *options.d, options.rounds) < 1:
        parser.error(f"--n {options.n}, --d {options.d} and --rounds {options.rounds} must be at least 1")
    return options


def main(arguments: Sequence[str]) -> None:
    options = _options(arguments)
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: this benchmark needs it (pip install triton)", file=sys.stderr)
        raise SystemExit(CANNOT_RUN)
    if options.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--interpret needs TRITON_INTERPRET=1 in the environment")
    if not options.interpret and not torch.cuda.is_available():
        print("no CUDA device: this benchmark needs a GPU (--interpret rehearses it on the CPU)", file=sys.stderr)
        raise SystemExit(CANNOT_RUN)
    scale = REHEARSAL if options.interpret else GPU
    run = Run(options, scale)
    for step in plan(options, scale):
        run.perform(step)
    code = run.finish()
    if code:
        raise SystemExit(code)
