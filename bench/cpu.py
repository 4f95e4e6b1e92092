"""The native CPU kernels against dense eager PyTorch: speed, share of the machine's peak, memory, growth with N.

python -m bench cpu             everything but the long runs
python -m bench cpu --long      also N = 32768 and 65536 (together about a quarter of an hour on two quiet cores)
python -m bench cpu --only peak memory

Times are medians with their quartiles. "bound" is the ratio to dense float32 that multiply-adds alone, at this
machine's peak, would allow: what no kernel can exceed here. Rows go to bench/results/cpu/. On a machine with other work
running, only the ratios within a table mean something.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from softclip_kernels.backends import native
from softclip_kernels.testing import Result

from . import memory as resident
from . import problems
from .problems import FORWARD_PRODUCTS, PRODUCTS, dtype_name
from .records import Record, Row, environment, table
from .timing import forward_backward, forward_only, interleaved

LABELS = ("table", "loss", "dtype", "pass", "n", "d", "scale", "threads")
F32, BF16 = torch.float32, torch.bfloat16
SCALES = (14.3, 100.0)

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
    """Goals 1 to 3: every loss and dtype, native and dense, interleaved; correctness first."""
    contenders: dict[str, Callable[[], object]] = {}
    cases: list[tuple[str, torch.dtype, str, float, str]] = []
    for loss in problems.LOSSES:
        for dtype in (F32, BF16):
            problems.check(loss, d, dtype, backend="native")
            timed: list[tuple[str, Callable[..., Callable[[], object]]]] = [("forward + backward", forward_backward)]
            if loss == "hard":
                timed.append(("forward", forward_only))
            dense = problems.dense(loss, n, d, dtype)
            fused = problems.fused(problems.target(loss, n, d, dtype), "native")
            for scale in SCALES:
                x, y, s = problems.operands(n, d, dtype, scale=scale)
                leaves = [leaf.detach() for leaf in (x, y, s)]
                problems.check_at_size(loss, {"native": Result.of(fused, *leaves)}, *leaves)
                for name, wrap in timed:
                    key = f"{loss} {dtype} {name} {scale}"
                    contenders[key] = wrap(fused, x, y, s)
                    cases.append((loss, dtype, name, scale, key))
                    if scale == SCALES[0]:  # dense time does not depend on the scale
                        contenders[f"dense {loss} {dtype} {name}"] = wrap(dense, x, y, s)
    peaks: dict[torch.dtype, list[float]] = {F32: [], BF16: []}
    contenders |= {f"peak {dtype}": partial(_measure_peak, dtype, peaks[dtype]) for dtype in peaks}
    timings = interleaved(contenders, rounds)
    rows = []
    for loss, dtype, name, scale, key in cases:
        goal = GOALS.get((loss, dtype, name))
        dense_float32 = timings[f"dense {loss} {F32} {name}"].median
        over_float32 = dense_float32 / timings[key].median
        products = (FORWARD_PRODUCTS if name == "forward" else PRODUCTS)[loss]
        bound = dense_float32 * statistics.median(peaks[dtype]) / (products * n * n * d)
        rows.append(
            {
                "loss": loss,
                "dtype": dtype_name(dtype),
                "pass": name,
                "n": n,
                "d": d,
                "scale": scale,
                "native": timings[key],
                "dense": timings[f"dense {loss} {dtype} {name}"],
                "over dense": timings[f"dense {loss} {dtype} {name}"].median / timings[key].median,
                "over dense float32": over_float32,
                "bound": bound,
                "share of bound": over_float32 / bound,
                "goal": goal,
                "reached": goal is None or over_float32 >= goal,
            }
        )
        if loss == "psd":
            over_hard = timings[key].median / timings[f"hard {dtype} {name} {scale}"].median
            rows[-1] |= {"over hard": over_hard, "at most": PSD_OVER_HARD, "within": over_hard <= PSD_OVER_HARD}
    return rows


def frozen(n: int, d: int, rounds: int) -> list[Row]:
    """A tower that is not trained (LiT): the hard loss where x or y needs no gradient, beside the one where both do."""
    rows: list[Row] = []
    for dtype in (F32, BF16):
        fused = problems.fused(problems.target("hard", n, d, dtype), "native")
        contenders: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
        for side in ("none", "x", "y"):
            x, y, scale = problems.operands(n, d, dtype)
            x.requires_grad_(side != "x"), y.requires_grad_(side != "y")
            contenders[side] = forward_backward(fused, x, y, scale)
        leaves = [leaf.detach() for leaf in (x, y, scale)]
        both = Result.of(fused, *leaves)
        results = {"both sides": both}
        for side, replaced in (("frozen x", "dy"), ("frozen y", "dx")):
            alone, dscale = contenders[side[-1]]()
            results[side] = replace(both, **{replaced: alone, "dscale": dscale})
        problems.check_at_size("hard", results, *leaves)
        timings = interleaved(contenders, rounds)
        for side in ("x", "y"):
            row: Row = {"loss": "hard", "dtype": dtype_name(dtype), "pass": f"frozen {side}", "n": n, "d": d}
            row |= {"native": timings[side], "both sides": timings["none"]}
            rows.append(row | {"of both sides": timings[side].median / timings["none"].median})
    return rows


def _measure_peak(dtype: torch.dtype, found: list[float]) -> None:
    found.append(native.peak(native.level(), torch.get_num_threads(), dtype == BF16))


def peak(n: int, widths: tuple[int, ...], rounds: int) -> list[Row]:
    """Goal 4: floating-point operations a second, as a share of what multiply-adds on registers alone reach in the same
    rounds."""
    rows = []
    for dtype in (F32, BF16):
        for d in widths:
            shares: dict[str, Callable[[], object]] = {}
            for loss in ("hard", "psd"):
                x, y, s = problems.operands(n, d, dtype)
                fused = problems.fused(problems.target(loss, n, d, dtype), "native")
                shares[loss] = forward_backward(fused, x, y, s)
                if loss == "hard":
                    shares["forward"] = forward_only(fused, x, y, s)
            peaks: list[float] = []
            shares["peak"] = partial(_measure_peak, dtype, peaks)
            timings = interleaved(shares, rounds)
            reached = statistics.median(peaks)
            for name, products in (("forward", 2), ("hard", 8), ("psd", 8)):
                rate = products * n * n * d / timings[name].median
                goal = None if name == "forward" else PEAK_GOALS[dtype]
                rows.append(
                    {
                        "loss": "hard, forward" if name == "forward" else name,
                        "dtype": dtype_name(dtype),
                        "n": n,
                        "d": d,
                        "seconds": timings[name],
                        "GFLOP/s": rate / 1e9,
                        "peak GFLOP/s": reached / 1e9,
                        "share": rate / reached,
                        "goal": goal,
                        "reached": goal is None or rate / reached >= goal,
                    }
                )
    return rows


def memory(n: int, d: int) -> list[Row]:
    """Goal 5: how far the process grows beyond its inputs and gradients, each case in a fresh process."""
    rows = []
    for loss in ("hard", "psd"):
        for dtype in (F32, BF16):
            growth = resident.in_fresh_process(_growth, loss, n, d, dtype, torch.get_num_threads())
            rows.append(
                {
                    "loss": loss,
                    "dtype": dtype_name(dtype),
                    "n": n,
                    "d": d,
                    "growth MiB": growth,
                    "goal": MEMORY_GOAL_MIB,
                    "reached": growth <= MEMORY_GOAL_MIB,
                }
            )
    return rows


def _growth(loss: str, n: int, d: int, dtype: torch.dtype, threads: int) -> float:
    """MiB of peak resident memory of one forward + backward, less the two gradients."""
    torch.set_num_threads(threads)

    def work(n: int) -> Callable[[], object]:
        fused = problems.fused(problems.target(loss, n, d, dtype), "native")
        return forward_backward(fused, *problems.operands(n, d, dtype))

    work(256)()  # libraries load
    return (resident.growth(work(n)) - 2 * n * d * dtype.itemsize) / 2**20


def growth(sizes: tuple[int, ...], d: int, rounds: int) -> list[Row]:
    """Goal 5: time over N², relative to the first size; one run from 32768 on."""
    rows: list[Row] = []
    for n in sizes:
        x, y, scale = problems.operands(n, d, F32)
        fused = problems.fused(problems.target("hard", n, d, F32), "native")
        few = n >= 32768
        timing = interleaved(
            {"native": forward_backward(fused, x, y, scale)}, 1 if few else rounds, warm_up=0 if few else 1
        )["native"]
        per_pair = timing.median / n**2
        relative = per_pair / rows[0]["ns per pair"] * 1e9 if rows else 1.0
        goal = GROWTH_GOAL if n <= GROWTH_UP_TO else None  # beyond, it is to complete
        rows.append(
            {
                "loss": "hard",
                "n": n,
                "d": d,
                "seconds": timing,
                "ns per pair": per_pair * 1e9,
                "relative": relative,
                "goal": goal,
                "reached": goal is None or relative <= goal,
            }
        )
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench cpu", description=__doc__.split("\n\n")[0])
    parts = ("speed", "frozen", "peak", "memory", "growth")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="which tables (default: all)")
    parser.add_argument("--n", type=int, default=8192, help="rows and columns of the speed table (default: 8192)")
    parser.add_argument("--d", type=int, default=512, help="embedding width (default: 512)")
    parser.add_argument("--rounds", type=int, default=7, help="of the interleaved timings (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    parser.add_argument("--long", action="store_true", help="also N = 32768 and 65536")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not native.levels():
        raise SystemExit(f"nothing to measure: {native.why_missing()}")
    n, d = options.n, options.d
    runs: dict[str, Callable[[], list[Row]]] = {
        "speed": lambda: speed(n, d, options.rounds),
        "frozen": lambda: frozen(n, d, options.rounds),
        "peak": lambda: peak(n, (256, 512, 768, 1024), options.rounds),
        "memory": lambda: memory(2 * n, d),
        "growth": lambda: growth((n, 2 * n, *((4 * n, 8 * n) if options.long else ())), d, 3),
    }
    record = Record("cpu", "cpu", LABELS)
    print(f"{record.machine}, level {native.level()}\n{environment()}")
    for part in options.only:
        found = runs[part]()
        print(f"\n{part}\n{table(found)}", flush=True)
        record.add({"table": part, **row, "threads": options.threads} for row in found)
    print(f"\nwritten to {record.path}")
