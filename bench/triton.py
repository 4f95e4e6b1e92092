"""The speed steps of `python -m bench gpu`: the fused loss, what it is compared with, and timing on the device's clock.

What a row's rivals are, all in bfloat16 operands:

    eager autocast      the dense loss under torch.autocast(bfloat16), as training loops evaluate it: logits in
                        bfloat16, softmaxes and cross-entropy in float32. The goals "over eager" mean this one, because
                        its sums are float32 as the library's are
    compiled autocast   torch.compile of the same function; the goal "over torch.compile"
    open_clip autocast  open_clip's formula, hard or distilled, under the same autocast; no goal
    eager bf16          the dense loss in bfloat16 throughout, softmaxes too: less traffic, few digits; no goal
"""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softclip_kernels.testing import FIELDS, Result

from . import common
from .gpu_checks import check_close

Row = dict[str, Any]
PRODUCTS = {"hard": 8, "psd": 8, "psd_teacher": 12}  # multiples of N² D floating-point operations, forward + backward
EAGER, COMPILED, OPEN_CLIP, EAGER_BF16 = "eager autocast", "compiled autocast", "open_clip autocast", "eager bf16"
RIVALS = {
    "hard": (EAGER, OPEN_CLIP, EAGER_BF16),
    "psd": (EAGER, EAGER_BF16),  # open_clip has no loss that teaches itself
    "psd_teacher": (EAGER, OPEN_CLIP, EAGER_BF16),
}
# Bytes an entry of the N x N matrix that a dense loss, hard or soft, holds at its peak: larger ones are not attempted.
BYTES = {EAGER: (26, 48), COMPILED: (26, 48), OPEN_CLIP: (28, 60), EAGER_BF16: (14, 28), "float32": (28, 48)}
GEMMS = 10  # products a measurement, about as long as a fused pass

# What the project asks for on an H100.
GOAL_SIZE = (32768, 512)  # of the multiples of the rivals
GEMM_SHARE = {"hard": 0.80, "psd_teacher": 0.70}  # of the matrix multiplication rate, N >= 16384
PSD_OVER_HARD = 1.15
OVER_EAGER = {"hard": 5.0, "psd": 8.0, "psd_teacher": 8.0}
OVER_COMPILED = 2.5


def speed(
    loss: str,
    n: int,
    d: int,
    dtype: torch.dtype,
    device: str,
    rivals: Sequence[str],
    with_hard: bool,
    rounds: int,
    seconds: float,
    gemm: int,
) -> Row:
    """One loss at one size: checked, then timed beside its rivals, the hard loss and matrix products, interleaved.
    `with_hard` is False where the hard loss is wrong at this size."""
    x, y, scale = common.operands(n, d, dtype, device)
    fused = common.fused(common.target(loss, n, d, dtype, device), "triton")
    row: Row = {"checked against": _check(loss, fused, x, y, scale)}
    contenders = {
        "fused": common.forward_backward(fused, x, y, scale),
        "fused forward": common.forward_only(fused, x, y, scale),
    }
    if with_hard and loss != "hard":
        hard = common.fused(common.target("hard", n, d, dtype, device), "triton")
        contenders["hard"] = common.forward_backward(hard, x, y, scale)
    a, b, out = (torch.randn(gemm, gemm, device=device).to(dtype) for _ in range(3))
    contenders["gemm"] = lambda: [torch.mm(a, b, out=out) for _ in range(GEMMS)]
    for rival in rivals:
        run = common.forward_backward(_rival(rival, loss, n, d, dtype, device), x, y, scale)
        start = time.monotonic()
        problem = _problem(run, BYTES[rival][loss != "hard"] * n * n)
        if problem is None:
            contenders[rival] = run
        row[rival if problem else f"{rival}, first call s"] = problem or time.monotonic() - start
    clocks = Clocks()
    timings = timed(contenders, rounds, seconds, clocks)
    return row | _figures(loss, n, d, gemm, timings) | clocks.summary()


def _check(loss: str, fused: common.Loss, x: Tensor, y: Tensor, scale: Tensor) -> str:
    """Against float32: dense where it fits, else the library's chunked backend, which is plain PyTorch, in tf32 for the
    sake of time. How accurate a right result is, is checked before, on sizes that fit in float64."""
    (n, d), device = x.shape, str(x.device)
    if fits(BYTES["float32"][loss != "hard"] * n * n):
        kind, exact = "dense float32", common.dense(loss, n, d, torch.float32, device, rounded=x.dtype)
    else:
        kind, exact = "chunked tf32", common.fused(common.target(loss, n, d, torch.float32, device), "chunked")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if kind == "dense float32" else "high")
    try:
        expected = Result.of(exact, x.float(), y.float(), scale)
    finally:
        torch.set_float32_matmul_precision(precision)
    got = Result.of(fused, x, y, scale)
    for field in FIELDS:
        check_close(field, getattr(got, field), getattr(expected, field))
    return kind


def _rival(rival: str, loss: str, n: int, d: int, dtype: torch.dtype, device: str) -> common.Loss:
    if rival == OPEN_CLIP:
        return under_autocast(open_clip(loss, n, d, dtype, device), device)
    dense = common.dense(loss, n, d, dtype, device)
    if rival == EAGER_BF16:
        return dense
    if rival == EAGER:
        return under_autocast(dense, device)
    torch._dynamo.reset()  # sizes are constants of the compiled code, as in training
    return torch.compile(under_autocast(dense, device), dynamic=False)


def under_autocast(loss: common.Loss, device: str) -> common.Loss:
    kind = torch.device(device).type

    def evaluate(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16):
            return loss(x, y, scale)

    return evaluate


def open_clip(loss: str, n: int, d: int, dtype: torch.dtype, device: str) -> common.Loss:
    """open_clip's ClipLoss (hard); for the other loss its DistillClipLoss: both similarity matrices of student and of
    teacher, and the cross-entropy of the hard pairing added."""
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


def fits(size: int) -> bool:
    torch.cuda.empty_cache()
    return size < torch.cuda.mem_get_info()[0]


def _problem(run: Callable[[], object], size: int) -> str | None:
    """Why a rival cannot be timed: it does not fit, or fails in its own way, which is no failure of the library."""
    if not fits(size):
        return "does not fit"
    try:
        run()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "does not fit"
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error)[:500]}"
    return None


def timed(
    contenders: Mapping[str, Callable[[], object]], rounds: int, seconds: float, clocks: Clocks
) -> dict[str, common.Timing]:
    """Every contender once a round on the device's own clock, the order alternating; two rounds to warm up, then at
    least `rounds` and `seconds`. The device waits for the host: what launching costs beyond the kernels counts."""
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(2):
        for run in contenders.values():
            run()
    torch.cuda.synchronize()
    begin = time.monotonic()
    done = 0
    with clocks:
        while done < rounds or time.monotonic() - begin < seconds:
            for name in reversed(list(contenders)) if done % 2 else contenders:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                contenders[name]()
                end.record()
                end.synchronize()
                measured[name].append(start.elapsed_time(end) / 1e3)
            done += 1
    return {name: common.Timing.of(values) for name, values in measured.items()}


class Clocks:
    """The device's clocks while it works, read again and again beside the timing; empty without nvidia-smi."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

    def __init__(self) -> None:
        self._samples: list[tuple[float, ...]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._over.is_set():
            values = nvidia_smi(self.FIELDS)
            if not values or self._over.is_set():  # a reading that took longer than the work is not one under load
                return
            try:
                self._samples.append(tuple(float(values[field].split()[0]) for field in self.FIELDS))
            except ValueError:  # "[N/A]"
                return
            self._over.wait(0.05)

    def summary(self) -> Row:
        """The median of each, and the lowest clock of the multiprocessors."""
        if not self._samples:
            return {}
        columns = dict(zip(self.FIELDS, zip(*self._samples, strict=True), strict=True))
        medians = {f"{field} under load": statistics.median(values) for field, values in columns.items()}
        return medians | {"clocks.sm lowest": min(columns["clocks.sm"]), "clock readings": len(self._samples)}


def nvidia_smi(fields: Sequence[str]) -> dict[str, str]:
    """{} where it is not installed or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else {}


def _figures(loss: str, n: int, d: int, gemm: int, timings: Mapping[str, common.Timing]) -> Row:
    row: Row = dict(timings)
    fused = timings["fused"].median
    row["TFLOP/s"] = PRODUCTS[loss] * n * n * d / fused / 1e12
    row["gemm TFLOP/s"] = GEMMS * 2 * gemm**3 / timings["gemm"].median / 1e12
    row["share of gemm"] = row["TFLOP/s"] / row["gemm TFLOP/s"]
    if "hard" in timings:
        row["over hard"] = fused / timings["hard"].median
    for rival in BYTES.keys() & timings.keys():
        row[f"over {rival}"] = timings[rival].median / fused
    return row | {"goals": goals(loss, n, d, row)}


def goals(loss: str, n: int, d: int, row: Row) -> dict[str, bool]:
    """Which of the project's goals apply to a row, and whether it reaches them."""
    reached = {}
    if n >= 16384:
        if loss in GEMM_SHARE:
            reached[f"share of gemm >= {GEMM_SHARE[loss]}"] = row["share of gemm"] >= GEMM_SHARE[loss]
        if loss == "psd" and "over hard" in row:
            reached[f"over hard <= {PSD_OVER_HARD}"] = row["over hard"] <= PSD_OVER_HARD
    if (n, d) == GOAL_SIZE:
        for rival, goal in ((EAGER, OVER_EAGER[loss]), (COMPILED, OVER_COMPILED)):
            if f"over {rival}" in row:
                reached[f"over {rival} >= {goal}"] = row[f"over {rival}"] >= goal
    return reached


def estimate(loss: str, n: int, d: int, rounds: int, compiled: bool) -> float:
    """Seconds that a step takes on an H100, roughly: preparation, the check, the rounds."""
    fused = PRODUCTS[loss] * n * n * d / 5e14
    rivals = 3 * 75e-12 * n * n if n <= GOAL_SIZE[0] else 0.0
    return 2 + 25 * compiled + 2e-10 * n * n + 2 * fused + max(1.0, (rounds + 3) * (2.5 * fused + rivals))
