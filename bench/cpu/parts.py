"""Where the time of the native calls goes: the share of each part in the time of their threads.

packing    operands into panels
products   of matrices: the logits; G with both operands, and what adds these up
softmax    exponentials and their sums, G, the positives
waiting    for the other threads, and until they start
passes     gradients cleared before the first block, scaled and rounded after the last

"working" is how many threads a call had, "ms" how long they worked. "GFLOP/s" counts the products that no way of
computing it does without, 2 N² D of a forward pass and 4 N² D of a backward pass, which makes the logits again (2 N² D)
where they were not kept. Its share of the peak is of what multiply-adds on registers alone reach on as many threads in
the same rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from softclip_kernels.backends import cpu

from .. import Row, problems
from ..problems import Case
from .large import measure_peak
from .small import DTYPES, LOSSES

PRODUCTS = {"forward": 2, "backward": 4}  # multiples of N² D floating-point operations
LONG_ENOUGH = 0.1  # seconds of calls in a round


def parts(sizes: Sequence[int], d: int, rounds: int) -> list[Row]:
    """A row for each pass of every loss, dtype and size. Correctness first."""
    rows: list[Row] = []
    for loss, dtype in product(LOSSES, DTYPES):
        problems.check(loss, d, dtype, backend="cpu")
        for n in sizes:
            rows += measure(Case(loss, dtype, n, d), rounds)
    return rows


def measure(case: Case, rounds: int) -> list[Row]:
    operands, fused = case.operands(), case.fused("cpu")
    most, peaks = torch.get_num_threads(), list[float]()
    seconds: dict[str, dict[str, float]] = {each: dict.fromkeys(cpu.PARTS, 0.0) for each in PRODUCTS}
    threads = dict.fromkeys(PRODUCTS, 0)
    start, calls = time.perf_counter(), 0
    _both(fused, operands)
    repeats = max(1, int(LONG_ENOUGH / (time.perf_counter() - start)))
    for _ in range(rounds):
        measure_peak(case.dtype, peaks)
        for _ in range(repeats):
            calls += 1
            for name, (found, count) in zip(PRODUCTS, _both(fused, operands), strict=True):
                threads[name] += count
                for part, one in found.items():
                    seconds[name][part] += one
    rows: list[Row] = []
    for name, found in seconds.items():
        whole, used = sum(found.values()), threads[name] / calls
        rate = PRODUCTS[name] * case.n**2 * case.d * calls * used / whole
        shares = {part: one / whole for part, one in found.items()}
        peak = statistics.median(peaks) / most * used
        row: Row = {**case.labels(), "pass": name, "working": used, "ms": whole / calls / used * 1e3, **shares}
        rows.append(row | {"GFLOP/s": rate / 1e9, "peak GFLOP/s": peak / 1e9, "share": rate / peak})
    return rows


def _both(fused: Callable[..., Tensor], operands: tuple[Tensor, Tensor, Tensor]) -> list[tuple[dict[str, float], int]]:
    """The parts of a forward and of its backward pass."""
    losses: list[Tensor] = []
    passes = (lambda: losses.append(fused(*operands)), lambda: torch.autograd.grad(losses[0], operands))
    return [cpu.parts(run) for run in passes]
