"""What the CPU and GPU benchmarks share: problems, the dense baselines, correctness first, interleaved timing, records.

A benchmark makes `operands`, names its contenders (functions of x, y, scale that return the loss), calls `check`, then
`interleaved`, and hands rows (plain dictionaries) to `write`.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import softclip_kernels
from softclip_kernels import Hard, Mix, SelfTeacher, Target, Teacher, partition
from softclip_kernels.testing import (
    Result,
    Standard,
    bounds,
    check_sensitive,
    contested_cosine,
)

RESULTS = Path(__file__).parent / "results"
SOFT_SHARE = 0.5  # of the pairs, in the PSD cases
TEACHER_SCALE = 14.3
LOSSES = ("hard", "psd", "psd_teacher")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, y, scale) -> 0-d loss


# Problems


def operands(
    n: int, d: int, dtype: torch.dtype, device: str = "cpu", scale: float = 14.3
) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, d) and y (n, d) of unit norm, paired row by row, and the fp32 scale; leaves that want gradients. The pairs
    are as alike as in the middle of training at this scale, so that gradients are well above rounding."""
    x, y = _pairs(n, d, dtype, device, seed=0, cosine=contested_cosine(n, d, scale))
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(scale, device=device).requires_grad_()


def _pairs(n: int, d: int, dtype: torch.dtype, device: str, seed: int, cosine: float) -> tuple[Tensor, Tensor]:
    """Two (n, d) of unit norm, row by row of about this cosine. Drawn on the device: a million rows take a CPU a
    minute."""
    generator = torch.Generator(device).manual_seed(seed)

    def unit_rows() -> Tensor:
        return F.normalize(torch.randn(n, d, device=device, generator=generator), dim=1)

    x = unit_rows()
    y = F.normalize(cosine * x + (1 - cosine**2) ** 0.5 * unit_rows(), dim=1)
    return x.to(dtype), y.to(dtype)


def target(loss: str, n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Target:
    """hard: CLIP. psd: half of the pairs are taught by the paired swap of the model's own distribution, tied scale.
    psd_teacher: half of the pairs are taught by another model's embeddings of width d."""
    if loss == "hard":
        return Hard()
    soft = partition(n, round(SOFT_SHARE * n), seed=0, step=0).to(device=device, dtype=torch.float32)
    if loss == "psd":
        return Mix(Hard(), SelfTeacher(swap="paired"), soft)
    if loss == "psd_teacher":
        a, b = teacher_embeddings(n, d, dtype, device)
        return Mix(Hard(), Teacher(a, b, TEACHER_SCALE), soft)
    raise ValueError(f"loss={loss!r} is not known; allowed: {', '.join(LOSSES)}")


def teacher_embeddings(n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return _pairs(n, d, dtype, device, seed=2, cosine=contested_cosine(n, d, TEACHER_SCALE))


def fused(loss_target: Target, backend: str = "auto") -> Loss:
    return lambda x, y, scale: softclip_kernels.softclip_loss(x, y, scale, loss_target, backend=backend)  # type: ignore[return-value]


def dense(
    loss: str, n: int, d: int, dtype: torch.dtype, device: str = "cpu", rounded: torch.dtype | None = None
) -> Loss:
    """The same loss as one writes it with stored matrices, in the operands' dtype; made once, timed often. `rounded`:
    the teacher's embeddings have this dtype's values, as those of a result in 16 bits that is compared with it."""
    labels = torch.arange(n, device=device)

    def logits(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return scale.to(x.dtype) * x @ y.T

    def hard(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        z = logits(x, y, scale)
        return 0.5 * (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels))

    if loss == "hard":
        return hard
    soft = partition(n, round(SOFT_SHARE * n), seed=0, step=0).to(device)
    embeddings = None if loss == "psd" else teacher_embeddings(n, d, rounded or dtype, device)

    def mixed(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        z = logits(x, y, scale)
        with torch.no_grad():
            t = z.T if embeddings is None else TEACHER_SCALE * embeddings[0].to(dtype) @ embeddings[1].to(dtype).T
            row_target, column_target = t.softmax(1), t.T.softmax(1)
            for one in (row_target, column_target):
                one.masked_fill_(~soft[:, None], 0.0)
                one.diagonal().masked_fill_(~soft, 1.0)
        return 0.5 * (F.cross_entropy(z, row_target) + F.cross_entropy(z.T, column_target))

    return mixed


# Correctness first


def check(loss: str, d: int, dtype: torch.dtype, device: str = "cpu", backend: str = "auto", n: int = 1000) -> None:
    """The library's standard (error at most twice dense PyTorch's, against float64) on a ragged size, and the timed
    dense baseline against the same definition. Raises AssertionError."""
    x, y, scale = (leaf.detach() for leaf in operands(n, d, dtype, device))
    loss_target = target(loss, n, d, dtype, device)
    standard = Standard.of(x, y, scale, loss_target)
    standard.check(Result.of(fused(loss_target, backend), x, y, scale))
    if dtype == torch.float32:
        standard.check(Result.of(dense(loss, n, d, dtype, device), x, y, scale))


def check_equal(results: Mapping[str, Result], x: Tensor, y: Tensor, scale: Tensor) -> None:
    """At the timed size, where float64 does not fit: every contender's loss and gradients agree with the first one's
    within twice the library's own bounds (testing.bounds), since both may be off. Raises AssertionError."""
    (first_name, first), *others = results.items()
    allowed = {field: 2 * bound for field, bound in bounds(first, x, y, scale).items()}
    check_sensitive(allowed, first, x, scale)
    for name, result in others:
        try:
            Standard(first, allowed).check(result)
        except AssertionError as error:
            raise AssertionError(f"{name} against {first_name}: {error}") from None


# Timing


@dataclass(frozen=True)
class Timing:
    """Seconds: the median, the quartiles as the spread, and every run's own."""

    median: float
    low: float
    high: float
    seconds: tuple[float, ...]

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        low, median, high = (
            statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        )
        return Timing(median, low, high, tuple(seconds))

    def __str__(self) -> str:
        return f"{self.median:.4g} s [{self.low:.4g}, {self.high:.4g}]"


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warm_up: int = 1,
    synchronise: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Every contender once a round, so that the machine's drift meets all alike; the order alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(-warm_up, rounds):
        for name in contenders if index % 2 else reversed(list(contenders)):
            synchronise()
            start = time.perf_counter()
            contenders[name]()
            synchronise()
            if index >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in seconds.items()}


def forward_only(loss: Loss, x: Tensor, y: Tensor, scale: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            loss(x, y, scale)

    return run


def forward_backward(loss: Loss, x: Tensor, y: Tensor, scale: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(x, y, scale), (x, y, scale))


# Records


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on: the device, the versions, the commit and whether the tree differed from it. A copy
    without .git (a machine lent for a run) takes the commit from SOFTCLIP_COMMIT and cannot tell the rest (None)."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "softclip_kernels": softclip_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _git("rev-parse", "--short=12", "HEAD") or os.environ.get("SOFTCLIP_COMMIT", "unknown"),
        "modified": None if status is None else bool(status),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(name: str, device: str, rows: Iterable[Mapping[str, Any]], folder: Path | None = None) -> Path:
    """<folder>/<name>.json: {"environment": ..., "rows": [...]}; a Timing in a row becomes its fields. bench/results/
    where no folder is given. Whole at every moment, so that a run that is ended leaves what it wrote last."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    plain = [{key: asdict(value) if isinstance(value, Timing) else value for key, value in row.items()} for row in rows]
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps({"environment": environment(device), "rows": plain}, indent=1) + "\n")
    return partial.replace(path)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text."""
    heads = list(rows[0])
    cells = [heads] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


@functools.cache  # so that a device that is lost later still has its name in the record
def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return model or platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
