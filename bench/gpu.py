"""The Triton kernels on a GPU: correctness first, then speed and memory, in one run of at most nine minutes.

python -m bench gpu                     everything; rows go to bench/results/gpu.json, a plot to bench/results/gpu.png
python -m bench gpu --n 32768 --d 512   some sizes
python -m bench gpu --interpret         a rehearsal on the CPU with tiny sizes, where TRITON_INTERPRET=1

Without a CUDA device it says so and exits with code 2. What does not fit in the device's memory or in the time is
recorded as such.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softclip_kernels.testing import Result

from . import common

Row = dict[str, Any]
SIZES = (4096, 16384, 32768, 65536, 131072)
WIDTHS = (512, 768, 1024)
PRODUCTS = {"hard": 8, "psd": 8, "psd_teacher": 12}  # multiples of N² D floating-point operations, forward + backward
GEMM = 8192
NO_GPU = 2  # exit code
# Bytes per entry of the N x N matrix that the dense losses hold at their peak; larger problems are not attempted.
DENSE_BYTES = {"hard": 24, "psd": 44, "psd_teacher": 44}

# What the project asks for on an H100, at N = 32768 and D = 512 where not said otherwise.
GEMM_SHARE = {"hard": 0.80, "psd_teacher": 0.70}  # for N >= 16384
PSD_OVER_HARD = 1.15
OVER_EAGER = {"hard": 5.0, "psd": 8.0, "psd_teacher": 8.0}
OVER_COMPILED = 2.5
MEMORY = (64 * 2**20, 64)  # bytes, and bytes a row


class Clock:
    """What is left of the run's time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def correctness(device: str, dtypes: Sequence[torch.dtype], n: int, d: int) -> list[Row]:
    """The library's standard for every loss and dtype on a ragged size; and ten repeats, bit by bit."""
    rows = []
    for loss in common.LOSSES:
        for dtype in dtypes:
            common.check(loss, d, dtype, device, "triton", n)
            x, y, scale = (leaf.detach() for leaf in common.operands(n, d, dtype, device))
            fused = common.fused(common.target(loss, n, d, dtype, device), "triton")
            first = Result.of(fused, x, y, scale)
            for _ in range(10):
                again = Result.of(fused, x, y, scale)
                if not (torch.equal(first.dx, again.dx) and torch.equal(first.dy, again.dy)):
                    raise AssertionError(f"{loss} {dtype}: two runs differ")
            rows.append({"kind": "correctness", "loss": loss, "dtype": _name(dtype), "n": n, "d": d, "passed": True})
    return rows


def test_suite(seconds: float) -> Row:
    """tests/test_triton_gpu.py: every target, dtype and adversarial input, 250 repeats, memory."""
    tests = Path(__file__).parent.parent / "tests" / "test_triton_gpu.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=tests.parent.parent, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"kind": "tests", "outcome": f"not finished after {seconds:.0f} s", "passed": None}
    last = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode:
        print(done.stdout[-8000:], done.stderr[-2000:])
    return {
        "kind": "tests",
        "outcome": last[0],
        "passed": done.returncode == 0,
        "seconds": time.monotonic() - start,
    }


def open_clip(loss: str, n: int, d: int, dtype: torch.dtype, device: str) -> common.Loss:
    """open_clip's formula as its training loop evaluates it: both similarity matrices, and for distillation the
    teacher's two, with the cross-entropy of the hard pairing added."""
    labels = torch.arange(n, device=device)
    embeddings = None if loss == "hard" else common.teacher_embeddings(n, d, dtype, device)

    def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
        return -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()

    def evaluate(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        per_image, per_text = scale.to(x.dtype) * x @ y.T, scale.to(x.dtype) * y @ x.T
        hard = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        if embeddings is None:
            return hard
        a, b = embeddings
        teacher_per_image, teacher_per_text = common.TEACHER_SCALE * a @ b.T, common.TEACHER_SCALE * b @ a.T
        return hard + (cross_entropy(teacher_per_image, per_image) + cross_entropy(teacher_per_text, per_text)) / 2

    return evaluate


def timed(contenders: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, common.Timing]:
    """common.interleaved on the device's own clock: CUDA events around every run, order alternating."""
    if device != "cuda":
        return common.interleaved(contenders, rounds)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(-2, rounds):
        for name in contenders if index % 2 else reversed(list(contenders)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contenders[name]()
            end.record()
            end.synchronize()
            if index >= 0:
                seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: common.Timing.of(values) for name, values in seconds.items()}


def speed(n: int, d: int, device: str, rounds: int, clock: Clock, compiled: bool) -> list[Row]:
    """Every loss at one size, forward and forward + backward, against the dense ways that fit and the GEMM rate of the
    same rounds. Equal results first."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    contenders: dict[str, Callable[[], object]] = {}
    rows: list[Row] = []
    x, y, scale = common.operands(n, d, dtype, device)
    for loss in common.LOSSES:
        fused = common.fused(common.target(loss, n, d, dtype, device), "triton")
        start = time.monotonic()
        result = Result.of(fused, x, y, scale)
        _synchronise(device)
        first = time.monotonic() - start
        contenders[f"{loss} fused"] = common.forward_backward(fused, x, y, scale)
        contenders[f"{loss} fused forward"] = common.forward_only(fused, x, y, scale)
        row: Row = {"kind": "speed", "loss": loss, "n": n, "d": d, "dtype": _name(dtype), "first call s": first}
        if not _fits(DENSE_BYTES[loss] * n * n, device):
            rows.append(row | {"dense": "does not fit"})
            continue
        exact = common.dense(loss, n, d, torch.float32, device)
        check_close(loss, result, Result.of(exact, x.float(), y.float(), scale))
        dense = common.dense(loss, n, d, dtype, device)
        others = {"dense": dense}
        if compiled and clock.left() > 60:
            others["compiled"] = torch.compile(dense)
        if loss != "psd":
            others["open_clip"] = open_clip(loss, n, d, dtype, device)
        for name, other in others.items():
            run = common.forward_backward(other, x, y, scale)
            if _runs(run):
                contenders[f"{loss} {name}"] = run
            else:
                row[name] = "does not fit"
        rows.append(row)
    side = GEMM if device == "cuda" else 64
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    contenders["gemm"] = lambda: a @ b
    timings = timed(contenders, rounds, device)
    rate = 2 * side**3 / timings["gemm"].median
    for row in rows:
        loss = row["loss"]
        fused_time = timings[f"{loss} fused"]
        row["fused"], row["fused forward"] = fused_time, timings[f"{loss} fused forward"]
        row["TFLOP/s"] = PRODUCTS[loss] * n * n * d / fused_time.median / 1e12
        row["gemm TFLOP/s"] = rate / 1e12
        row["share of gemm"] = row["TFLOP/s"] / row["gemm TFLOP/s"]
        row["over hard"] = fused_time.median / timings["hard fused"].median
        for rival in ("dense", "compiled", "open_clip"):
            if f"{loss} {rival}" in timings:
                row[rival] = timings[f"{loss} {rival}"]
                row[f"over {rival}"] = timings[f"{loss} {rival}"].median / fused_time.median
        row["goals"] = goals(row)
    return rows


def check_close(loss: str, fused: Result, exact: Result, relative: float = 0.02) -> None:
    """The timed result against dense float32 of the same operands, by norm: no timing of a wrong result. How accurate a
    right one is, is checked before, on sizes that fit in float64."""
    for field in ("loss", "dx", "dy", "dscale"):
        got, expected = getattr(fused, field).float(), getattr(exact, field).float()
        error = ((got - expected).norm() / expected.norm()).item()
        if not error <= relative:
            raise AssertionError(f"{loss}: {field} differs from dense float32 by {error:.1e}, not by {relative:.0e}")


def _runs(run: Callable[[], object]) -> bool:
    try:
        run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def goals(row: Row) -> dict[str, bool]:
    """Which of the project's goals apply to a row, and whether it reaches them."""
    reached = {}
    if row["n"] >= 16384:
        if row["loss"] in GEMM_SHARE:
            reached[f"share of gemm >= {GEMM_SHARE[row['loss']]}"] = row["share of gemm"] >= GEMM_SHARE[row["loss"]]
        if row["loss"] == "psd":
            reached[f"over hard <= {PSD_OVER_HARD}"] = row["over hard"] <= PSD_OVER_HARD
    if row["n"] == 32768 and row["d"] == 512:
        for other, goal in (("dense", OVER_EAGER[row["loss"]]), ("compiled", OVER_COMPILED)):
            if f"over {other}" in row:
                reached[f"over {other} >= {goal}"] = row[f"over {other}"] >= goal
    return reached


def memory(n: int, d: int, device: str) -> list[Row]:
    """The allocator's peak beyond inputs and gradients (in the inputs' dtype and, while they are summed, in fp32)."""
    rows = []
    dtype = torch.bfloat16
    for loss in common.LOSSES:
        x, y, scale = common.operands(n, d, dtype, device)
        run = common.forward_backward(common.fused(common.target(loss, n, d, dtype, device), "triton"), x, y, scale)
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        beyond = torch.cuda.max_memory_allocated() - before - 2 * n * d * (x.element_size() + 4)
        allowed = MEMORY[0] + MEMORY[1] * n
        goal = {f"<= {allowed >> 20} MiB": beyond <= allowed}
        rows.append({"kind": "memory", "loss": loss, "n": n, "d": d, "MiB beyond": beyond / 2**20, "goals": goal})
    return rows


def million(clock: Clock) -> Row:
    """N = 2^20, D = 512, forward and backward, on one device."""
    n, d = 1 << 20, 512
    row: Row = {"kind": "million", "loss": "hard", "n": n, "d": d}
    if clock.left() < 60:
        return row | {"outcome": "no time left"}
    generator = torch.Generator("cuda").manual_seed(0)
    x = F.normalize(torch.randn(n, d, device="cuda", generator=generator), dim=1)
    y = F.normalize(x + 0.5 * F.normalize(torch.randn(n, d, device="cuda", generator=generator), dim=1), dim=1)
    leaves = (x.bfloat16().requires_grad_(), y.bfloat16().requires_grad_(), torch.tensor(14.3, device="cuda"))
    start = time.monotonic()
    loss = common.fused(common.target("hard", n, d, torch.bfloat16, "cuda"), "triton")(*leaves)
    loss.backward()
    torch.cuda.synchronize()
    finite = bool(loss.isfinite() and leaves[0].grad.isfinite().all())  # type: ignore[union-attr]
    return row | {"outcome": "completed" if finite else "not finite", "seconds": time.monotonic() - start}


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
        line = [(row["n"], row["share of gemm"]) for row in rows if (row["loss"], row["d"]) == (loss, d)]
        axes.plot(*zip(*line, strict=True), marker="o", label=f"{loss}, D = {d}")
    axes.set(xscale="log", xlabel="N", ylabel="share of the matrix multiplication rate", ylim=(0, None))
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _fits(size: int, device: str) -> bool:
    if device != "cuda":
        return True
    torch.cuda.empty_cache()
    return size < torch.cuda.mem_get_info()[0]


def _device_row() -> Row:
    """Driver and clocks, where nvidia-smi tells them."""
    import triton

    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    row: Row = {"kind": "device", "triton": triton.__version__, "cuda": torch.version.cuda}
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        row |= dict(zip(fields.split(","), (v.strip() for v in done.stdout.split("\n")[0].split(",")), strict=False))
    except (OSError, subprocess.TimeoutExpired):
        row["driver_version"] = "unknown"
    return row


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=SIZES, help="batch sizes")
    parser.add_argument("--d", type=int, nargs="+", default=WIDTHS, help="embedding widths")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole run")
    parser.add_argument("--no-tests", action="store_true", help="leave tests/test_triton_gpu.py out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--interpret", action="store_true", help="rehearse on the CPU, where TRITON_INTERPRET=1")
    parser.add_argument("--name", default="gpu", help="of the files in bench/results/")
    options = parser.parse_args(arguments)
    if min(*options.n, *options.d, options.rounds) < 1:
        parser.error(f"--n {options.n}, --d {options.d} and --rounds {options.rounds} must be at least 1")
    return options


def main(arguments: Sequence[str]) -> None:
    options = _options(arguments)
    rehearsal = options.interpret
    if rehearsal and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--interpret needs TRITON_INTERPRET=1 in the environment")
    if not rehearsal and not torch.cuda.is_available():
        print("no CUDA device: this benchmark needs a GPU (--interpret rehearses it on the CPU)", file=sys.stderr)
        raise SystemExit(NO_GPU)
    device = "cpu" if rehearsal else "cuda"
    clock = Clock(60 * options.minutes)
    rows = [_device_row()]
    dtypes = (torch.float32,) if rehearsal else (torch.bfloat16, torch.float16, torch.float32)
    rows += correctness(device, dtypes, *((65, 24) if rehearsal else (1000, 96)))
    common.write(options.name, device, rows)
    if not rehearsal and not options.no_tests:
        rows.append(test_suite(0.45 * clock.left()))
    for d in options.d:
        for n in options.n:
            if clock.left() < 20 or not _fits(16 * n * d, device):
                reason = "no time left" if clock.left() < 20 else "does not fit"
                rows.append({"kind": "speed", "n": n, "d": d, "outcome": reason})
                continue
            rows += speed(n, d, device, options.rounds, clock, not (options.no_compile or rehearsal or d != 512))
            common.write(options.name, device, rows)
            print(f"N = {n}, D = {d}: done, {clock.left():.0f} s left", flush=True)
    if not rehearsal:
        rows += memory(16384, 512, device)
        rows.append(million(clock))
    path = common.write(options.name, device, rows)
    measured = [row for row in rows if "share of gemm" in row]
    columns = ("loss", "n", "d", "fused", "TFLOP/s", "share of gemm", "over hard")
    if measured:
        print(common.table([{key: row[key] for key in columns} for row in measured]))
        plot(measured, path.with_suffix(".png"))
    missed = [
        f"{row['loss']} N={row['n']} D={row['d']}: {goal}"
        for row in rows
        for goal, reached in row.get("goals", {}).items()
        if not reached
    ]
    print(f"{path}; goals missed: {'; '.join(missed) or 'none'}")
    if any(row.get("passed") is False for row in rows):
        raise SystemExit(1)
