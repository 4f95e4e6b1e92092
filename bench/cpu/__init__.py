"""The CPU kernels against dense eager PyTorch: speed, share of the machine's peak, memory, growth with N.

python -m bench cpu             everything but the long runs
python -m bench cpu --long      also N = 32768 and 65536 (together about a quarter of an hour on two quiet cores)
python -m bench cpu --only peak memory

Rows go to bench/results/cpu/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from softclip_kernels.backends import cpu

from .. import Row
from ..records import Record, table
from .large import frozen, growth, memory, peak, speed

LABELS = ("table", "loss", "dtype", "pass", "n", "d", "scale", "threads")


def main(arguments: Sequence[str]) -> None:
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
    if not cpu.levels():
        raise SystemExit(f"nothing to measure: {cpu.why_missing()}")
    n, d = options.n, options.d
    runs: dict[str, Callable[[], list[Row]]] = {
        "speed": lambda: speed(n, d, options.rounds),
        "frozen": lambda: frozen(n, d, options.rounds),
        "peak": lambda: peak(n, (256, 512, 768, 1024), options.rounds),
        "memory": lambda: memory(2 * n, d),
        "growth": lambda: growth((n, 2 * n, *((4 * n, 8 * n) if options.long else ())), d, 3),
    }
    record = Record("cpu", "cpu", LABELS)
    print(f"{record.machine}, level {cpu.level()}\n{record.environment}")
    for part in options.only:
        found = runs[part]()
        print(f"\n{part}\n{table(found)}", flush=True)
        record.add({"table": part, **row, "threads": options.threads} for row in found)
    print(f"\nwritten to {record.path}")
