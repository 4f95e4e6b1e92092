"""Interleaved timing, what is timed of a loss, and a GPU's clocks meanwhile."""

from __future__ import annotations

import math
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .problems import Loss


@dataclass(frozen=True)
class Timing:
    """Seconds: the median, the quartiles as the spread, and every run's own."""

    median: float
    low: float
    high: float
    seconds: tuple[float, ...]

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        return Timing(*quartiles(seconds), tuple(seconds))

    def __str__(self) -> str:
        return f"{self.median:.4g} s [{self.low:.4g}, {self.high:.4g}]"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, the lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def host_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def device_seconds(run: Callable[[], object]) -> float:
    """By the GPU's own clock, which waits for the host: what launching costs beyond the kernels counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def repeated(run: Callable[[], object], shortest: float) -> Callable[[], float]:
    """A measurement of a short run: the mean seconds of as many in a row as take `shortest` seconds together. How many
    that is, the fastest of three tells now."""
    calls = max(1, math.ceil(shortest / max(1e-6, min(host_seconds(run) for _ in range(3)))))

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    return measure


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    warm_up: int = 1,
    seconds: float = 0.0,
    measure: Callable[[Callable[[], Any]], float] = host_seconds,
    at_most: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Every contender once a round, so that the machine's drift meets all alike; the order alternates. Takes at least
    so many rounds and, after `warm_up` rounds that do not count, at least so many seconds. A contender that `at_most`
    names takes part in its first so many rounds only, and not in those that do not count."""
    few = at_most or {}
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    done, begin = -warm_up, time.monotonic()
    while done < rounds or time.monotonic() - begin < seconds:
        if done == 0:
            begin = time.monotonic()
        for name in contenders if done % 2 else reversed(list(contenders)):
            if name in few and not 0 <= done < few[name]:
                continue
            elapsed = measure(contenders[name])
            if done >= 0:
                measured[name].append(elapsed)
        done += 1
    return {name: Timing.of(values) for name, values in measured.items()}


def forward_only(loss: Loss, x: Tensor, y: Tensor, scale: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            loss(x, y, scale)

    return run


def forward_backward(loss: Loss, x: Tensor, y: Tensor, scale: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients of those operands that require one."""
    wanted = [operand for operand in (x, y, scale) if operand.requires_grad]
    return lambda: torch.autograd.grad(loss(x, y, scale), wanted)


class Clocks:
    """A GPU's clocks while it works, read again and again beside the timing; empty without nvidia-smi."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

    def __init__(self) -> None:
        self._samples: list[tuple[float, ...]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Clocks:
        self._thread.start()
        return self

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

    def summary(self) -> dict[str, float]:
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
