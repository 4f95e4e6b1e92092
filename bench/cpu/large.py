"""The tables at sizes that fill the machine: speed, frozen towers, share of the peak, memory, growth with N.

Times are medians with their quartiles. "bound" is the ratio to dense float32 that multiply-adds alone, at this
machine's peak, would allow: what no kernel can exceed here. On a machine with other work running, only the ratios
within a table mean something.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from softclip_kernels.backends import cpu
from softclip_kernels.testing import Result

from .. import Row, problems
from .. import memory as resident
from ..problems import BUILT_IN, FORWARD_PRODUCTS, LOSSES, PRODUCTS, Case
from ..timing import Timing, forward_backward, forward_only, interleaved

F32, BF16 = DTYPES = torch.float32, torch.bfloat16
SCALES = (14.3, 100.0)
PASSES = (("forward + backward", forward_backward), ("forward", forward_only))  # the second of the hard loss only

# What the project asks for, as multiples of dense eager float32 at N = 8192, D = 512 and two threads.
GOALS = {
    ("hard", F32, "forward"): 5.0,
    ("hard", F32, "forward + backward"): 4.0,
    ("psd", F32, "forward + backward"): 9.0,
    ("psd_teacher", F32, "forward + backward"): 6.0,
    ("hard", BF16, "forward + backward"): 7.5,
    ("psd", BF16, "forward + backward"): 16.0,
}
PSD_OVER_HARD = 1.15  # at most, of the time
PEAK_GOALS = {F32: 0.85, BF16: 0.80}  # hard and psd
MEMORY_GOAL_MIB = 32
GROWTH_GOAL, GROWTH_UP_TO = 1.10, 32768  # time over N², relative to the first size


def speed(n: int, d: int, rounds: int) -> list[Row]:
    """Goals 1 to 3: every loss and dtype, cpu and dense, interleaved; beside hard torch's own. Correctness first."""
    no_built_in = problems.why_no_built_in()
    contenders: dict[str, Callable[[], object]] = {}
    timed: list[tuple[Case, str, float, str]] = []
    for case in (Case(loss, dtype, n, d) for loss in LOSSES for dtype in DTYPES):
        problems.check(case.loss, d, case.dtype, backend="cpu")
        fused, dense = case.fused("cpu"), case.dense()
        for scale in SCALES:
            operands = problems.operands(n, d, case.dtype, scale=scale)
            leaves = [leaf.detach() for leaf in operands]
            problems.check_at_size(case, {"cpu": Result.of(fused, *leaves)}, *leaves)
            for name, run in PASSES[: 2 if case.loss == "hard" else 1]:
                key = f"{case.loss} {case.dtype} {name} {scale}"
                contenders[key] = run(fused, *operands)
                timed.append((case, name, scale, key))
                if scale == SCALES[0]:  # dense time does not depend on the scale
                    contenders[f"dense {case.loss} {case.dtype} {name}"] = run(dense, *operands)
                    if case.loss == "hard" and not no_built_in:
                        contenders[f"{BUILT_IN} {case.dtype} {name}"] = run(problems.built_in, *operands)
    peaks: dict[torch.dtype, list[float]] = {dtype: [] for dtype in DTYPES}
    contenders |= {f"peak {dtype}": partial(measure_peak, dtype, peaks[dtype]) for dtype in DTYPES}
    timings = interleaved(contenders, rounds)
    rows = []
    for case, name, scale, key in timed:
        dense_timing = timings[f"dense {case.loss} {case.dtype} {name}"]
        dense_float32 = timings[f"dense {case.loss} {F32} {name}"].median
        over_float32 = dense_float32 / timings[key].median
        products = (FORWARD_PRODUCTS if name == "forward" else PRODUCTS)[case.loss]
        bound = dense_float32 * statistics.median(peaks[case.dtype]) / (products * n * n * d)
        goal = GOALS.get((case.loss, case.dtype, name))
        row: Row = {
            **case.labels(),
            "pass": name,
            "scale": scale,
            "cpu": timings[key],
            "dense": dense_timing,
            "over dense": dense_timing.median / timings[key].median,
            "over dense float32": over_float32,
            "bound": bound,
            "share of bound": over_float32 / bound,
            "goal": goal,
            "reached": goal is None or over_float32 >= goal,
        }
        if case.loss == "hard":
            row |= _built_in(timings.get(f"{BUILT_IN} {case.dtype} {name}"), timings[key], no_built_in)
        if case.loss == "psd":
            over_hard = timings[key].median / timings[f"hard {case.dtype} {name} {scale}"].median
            row |= {"over hard": over_hard, "at most": PSD_OVER_HARD, "within": over_hard <= PSD_OVER_HARD}
        rows.append(row)
    return rows


def _built_in(built_in: Timing | None, fused: Timing, why_not: str | None) -> Row:
    if built_in is None:
        return {BUILT_IN: why_not}
    return {BUILT_IN: built_in, f"over {BUILT_IN}": built_in.median / fused.median}


def frozen(n: int, d: int, rounds: int) -> list[Row]:
    """A tower that is not trained (LiT): the hard loss where x or y needs no gradient, beside the one where both do."""
    rows: list[Row] = []
    for case in (Case("hard", dtype, n, d) for dtype in DTYPES):
        fused = case.fused("cpu")
        x, y, scale = case.operands()
        leaves = [leaf.detach() for leaf in (x, y, scale)]
        contenders = {
            "both": forward_backward(fused, x, y, scale),
            "frozen x": forward_backward(fused, leaves[0], y, scale),
            "frozen y": forward_backward(fused, x, leaves[1], scale),
        }
        both = Result.of(fused, *leaves)
        (dy, dscale_x), (dx, dscale_y) = contenders["frozen x"](), contenders["frozen y"]()
        alone = {"frozen x": replace(both, dy=dy, dscale=dscale_x), "frozen y": replace(both, dx=dx, dscale=dscale_y)}
        problems.check_at_size(case, {"both": both, **alone}, *leaves)
        timings = interleaved(contenders, rounds)
        for name in alone:
            row: Row = {**case.labels(), "pass": name, "cpu": timings[name], "both": timings["both"]}
            rows.append(row | {"of both": timings[name].median / timings["both"].median})
    return rows


def measure_peak(dtype: torch.dtype, found: list[float]) -> None:
    """Adds the peak of now to those that were found."""
    found.append(cpu.peak(cpu.level(), torch.get_num_threads(), dtype == BF16))


def peak(n: int, widths: tuple[int, ...], rounds: int) -> list[Row]:
    """Goal 4: floating-point operations a second, as a share of what multiply-adds on registers alone reach in the same
    rounds."""
    rows: list[Row] = []
    for dtype, d in product(DTYPES, widths):
        hard, psd = Case("hard", dtype, n, d), Case("psd", dtype, n, d)
        operands, peaks = hard.operands(), list[float]()
        contenders: dict[str, Callable[[], object]] = {
            "hard, forward": forward_only(hard.fused("cpu"), *operands),
            "hard": forward_backward(hard.fused("cpu"), *operands),
            "psd": forward_backward(psd.fused("cpu"), *operands),
            "peak": partial(measure_peak, dtype, peaks),
        }
        timings = interleaved(contenders, rounds)
        reached = statistics.median(peaks)
        products_of = {"hard, forward": FORWARD_PRODUCTS["hard"], "hard": PRODUCTS["hard"], "psd": PRODUCTS["psd"]}
        for name, products in products_of.items():
            rate = products * n * n * d / timings[name].median
            goal = None if name == "hard, forward" else PEAK_GOALS[dtype]
            row: Row = {**hard.labels(), "loss": name, "seconds": timings[name]}
            row |= {"GFLOP/s": rate / 1e9, "peak GFLOP/s": reached / 1e9, "share": rate / reached}
            rows.append(row | {"goal": goal, "reached": goal is None or rate / reached >= goal})
    return rows


def memory(n: int, d: int) -> list[Row]:
    """Goal 5: how far the process grows beyond its inputs and gradients, each case in a fresh process."""
    rows: list[Row] = []
    for case in (Case(loss, dtype, n, d) for loss in ("hard", "psd") for dtype in DTYPES):
        growth = resident.in_fresh_process(_growth, case, torch.get_num_threads())
        reached = growth <= MEMORY_GOAL_MIB
        rows.append({**case.labels(), "growth MiB": growth, "goal": MEMORY_GOAL_MIB, "reached": reached})
    return rows


def _growth(case: Case, threads: int) -> float:
    """MiB of peak resident memory of one forward + backward, less the two gradients."""
    torch.set_num_threads(threads)
    small = replace(case, n=256)
    forward_backward(small.fused("cpu"), *small.operands())()  # libraries load
    grown = resident.growth(forward_backward(case.fused("cpu"), *case.operands()))
    return (grown - 2 * case.n * case.d * case.dtype.itemsize) / 2**20


def growth(sizes: tuple[int, ...], d: int, rounds: int) -> list[Row]:
    """Goal 5: time over N², relative to the first size; one run from 32768 on."""
    rows: list[Row] = []
    for case in (Case("hard", F32, n, d) for n in sizes):
        few = case.n >= 32768
        run = forward_backward(case.fused("cpu"), *case.operands())
        timing = interleaved({"cpu": run}, 1 if few else rounds, warm_up=0 if few else 1)["cpu"]
        per_pair = timing.median / case.n**2 * 1e9
        relative = per_pair / rows[0]["ns per pair"] if rows else 1.0
        goal = GROWTH_GOAL if case.n <= GROWTH_UP_TO else None  # larger sizes are informational
        row: Row = {**case.labels(), "seconds": timing, "ns per pair": per_pair, "relative": relative}
        rows.append(row | {"goal": goal, "reached": goal is None or relative <= goal})
    return rows
