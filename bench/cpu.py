"""The CPU kernels against dense eager PyTorch: speed, share of the machine's peak, memory, growth with N.

python -m bench cpu             everything but the long runs
python -m bench cpu --long      also N = 32768 and 65536 (together about a quarter of an hour on two quiet cores)
python -m bench cpu --only peak memory

Times are medians with their quartiles. "bound" is the ratio to dense float32 that multiply-adds alone, at this
machine's peak, would allow: what no kernel can exceed here. Rows go to bench/results/cpu.json. On a machine with other
work running, only the ratios within a table mean something.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softclip_kernels.backends import cpu
from softclip_kernels.testing import Result

from . import common

Row = dict[str, Any]
F32, BF16 = torch.float32, torch.bfloat16
SCALES = (14.3, 100.0)
PRODUCTS = {"hard": 8, "psd": 8, "psd_teacher": 12}  # multiples of N² D floating-point operations, forward + backward
FORWARD_PRODUCTS = {"hard": 2, "psd": 2, "psd_teacher": 4}

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


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def speed(n: int, d: int, rounds: int) -> list[Row]:
    """Goals 1 to 3: every loss and dtype, ours and dense, interleaved; correctness first."""
    contenders: dict[str, Callable[[], object]] = {}
    cases: list[tuple[str, torch.dtype, str, float, str]] = []
    for loss in common.LOSSES:
        for dtype in (F32, BF16):
            common.check(loss, d, dtype, backend="cpu")
            timed = [("forward + backward", common.forward_backward)]
            if loss == "hard":
                timed.append(("forward", common.forward_only))
            dense = common.dense(loss, n, d, dtype)
            fused = common.fused(common.target(loss, n, d, dtype), "cpu")
            for scale in SCALES:
                x, y, s = common.operands(n, d, dtype, scale=scale)
                _check_timed_size(loss, fused, x.detach(), y.detach(), s.detach())
                for name, wrap in timed:
                    key = f"{loss} {dtype} {name} {scale}"
                    contenders[key] = wrap(fused, x, y, s)
                    cases.append((loss, dtype, name, scale, key))
                    if scale == SCALES[0]:  # dense time does not depend on the scale
                        contenders[f"dense {loss} {dtype} {name}"] = wrap(dense, x, y, s)
    peaks: dict[torch.dtype, list[float]] = {F32: [], BF16: []}
    contenders |= {f"peak {dtype}": partial(_measure_peak, dtype, peaks[dtype]) for dtype in peaks}
    timings = common.interleaved(contenders, rounds)
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
                "dtype": _dtype(dtype),
                "pass": name,
                "n": n,
                "d": d,
                "scale": scale,
                "cpu": timings[key],
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


def _check_timed_size(loss: str, fused: common.Loss, x: Tensor, y: Tensor, scale: Tensor) -> None:
    dense = common.dense(loss, x.shape[0], x.shape[1], F32, rounded=x.dtype)
    results = {"dense": Result.of(dense, x.float(), y.float(), scale), "cpu": Result.of(fused, x, y, scale)}
    common.check_equal(results, x, y, scale)


def _measure_peak(dtype: torch.dtype, found: list[float]) -> None:
    found.append(cpu.peak(cpu.level(), torch.get_num_threads(), dtype == BF16))


def peak(n: int, widths: tuple[int, ...], rounds: int) -> list[Row]:
    """Goal 4: floating-point operations a second, as a share of what multiply-adds on registers alone reach in the same
    rounds."""
    rows = []
    for dtype in (F32, BF16):
        for d in widths:
            shares: dict[str, Callable[[], object]] = {}
            for loss in ("hard", "psd"):
                x, y, s = common.operands(n, d, dtype)
                fused = common.fused(common.target(loss, n, d, dtype), "cpu")
                shares[loss] = common.forward_backward(fused, x, y, s)
                if loss == "hard":
                    shares["forward"] = common.forward_only(fused, x, y, s)
            peaks: list[float] = []
            shares["peak"] = partial(_measure_peak, dtype, peaks)
            timings = common.interleaved(shares, rounds)
            reached = statistics.median(peaks)
            for name, products in (("forward", 2), ("hard", 8), ("psd", 8)):
                rate = products * n * n * d / timings[name].median
                goal = None if name == "forward" else PEAK_GOALS[dtype]
                rows.append(
                    {
                        "loss": "hard, forward" if name == "forward" else name,
                        "dtype": _dtype(dtype),
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
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                growth = pool.apply(_growth, (loss, n, d, _dtype(dtype), torch.get_num_threads()))
            rows.append(
                {
                    "loss": loss,
                    "dtype": _dtype(dtype),
                    "n": n,
                    "d": d,
                    "growth MiB": growth,
                    "goal": MEMORY_GOAL_MIB,
                    "reached": growth <= MEMORY_GOAL_MIB,
                }
            )
    return rows


def _growth(loss: str, n: int, d: int, dtype_name: str, threads: int) -> float:
    """MiB of peak resident memory of one forward + backward, less the two gradients."""
    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype_name)
    fused = common.fused(common.target(loss, n, d, dtype), "cpu")
    small = common.operands(256, d, dtype)
    common.forward_backward(common.fused(common.target(loss, 256, d, dtype), "cpu"), *small)()  # libraries load
    x, y, scale = common.operands(n, d, dtype)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    gradients = common.forward_backward(fused, x, y, scale)()
    peak = _resident("VmHWM")
    del gradients
    return (peak - before - (x.nbytes + y.nbytes) / 1024) / 1024


def _resident(field: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def growth(sizes: tuple[int, ...], d: int, rounds: int) -> list[Row]:
    """Goal 5: time over N², relative to the first size; one run from 32768 on."""
    rows: list[Row] = []
    for n in sizes:
        x, y, scale = common.operands(n, d, F32)
        fused = common.fused(common.target("hard", n, d, F32), "cpu")
        few = n >= 32768
        timing = common.interleaved(
            {"cpu": common.forward_backward(fused, x, y, scale)}, 1 if few else rounds, warm_up=0 if few else 1
        )["cpu"]
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
    parts = ("speed", "peak", "memory", "growth")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="which tables (default: all)")
    parser.add_argument("--n", type=int, default=8192, help="rows and columns of the speed table (default: 8192)")
    parser.add_argument("--d", type=int, default=512, help="embedding width (default: 512)")
    parser.add_argument("--rounds", type=int, default=7, help="of the interleaved timings (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    parser.add_argument("--long", action="store_true", help="also N = 32768 and 65536")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not cpu.levels():
        raise SystemExit(f"nothing to measure: {cpu.why_missing()}")
    n, d = options.n, options.d
    runs: dict[str, Callable[[], list[Row]]] = {
        "speed": lambda: speed(n, d, options.rounds),
        "peak": lambda: peak(n, (256, 512, 768, 1024), options.rounds),
        "memory": lambda: memory(2 * n, d),
        "growth": lambda: growth((n, 2 * n, *((4 * n, 8 * n) if options.long else ())), d, 3),
    }
    print(f"{common.environment('cpu')}\nlevel {cpu.level()}")
    rows: list[Row] = []
    for part in options.only:
        found = runs[part]()
        print(f"\n{part}\n{common.table(_same_keys(found))}", flush=True)
        rows += [{"table": part, **row} for row in found]
    print(f"\nwritten to {common.write('cpu', 'cpu', rows)}")


def _same_keys(rows: list[Row]) -> list[Row]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: "" if row.get(key) is None else row[key] for key in keys} for row in rows]
