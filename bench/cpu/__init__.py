"""The CPU kernels against dense eager PyTorch: speed, small batches, share of the machine's peak, memory, growth.

python -m bench cpu             everything but the long runs
python -m bench cpu --long      also N = 32768 and 65536 (together about a quarter of an hour on two quiet cores)
python -m bench cpu --only peak memory
python -m bench cpu --only small --sizes 32 128 256 512 1024 2048 4096 8192
python -m bench cpu --only parts   where the time of the native calls goes
python -m bench cpu --only two     two processes at once on the same cores
python -m bench cpu --plot      draw docs/cpu_time.png and fill in docs/performance.md from the record

Rows go to bench/results/cpu/. large.py, small.py, parts.py and two.py say what their tables hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from softclip_kernels.backends import cpu

from .. import ROOT, Row
from ..records import Record, table
from . import page, plot, two
from . import parts as parts_table
from .large import frozen, growth, memory, peak, speed
from .small import SIZES, small_batches

LABELS = ("table", "contender", "loss", "dtype", "pass", "n", "d", "scale", "threads")
TABLES = ("speed", "small", "frozen", "peak", "parts", "memory", "growth", "two")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="which tables (default: all)")
    parser.add_argument("--n", type=int, default=8192, help="rows and columns of the speed table (default: 8192)")
    parser.add_argument("--d", type=int, default=512, help="embedding width (default: 512)")
    parser.add_argument("--rounds", type=int, default=7, help="of the interleaved timings (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    parser.add_argument("--long", action="store_true", help="also N = 32768 and 65536")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), help="of small and parts (default: 32 to 2048)"
    )
    parser.add_argument("--limit", type=float, default=10.0, help="seconds a call of small may take (default: 10)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a stretch of two (default: 2)")
    parser.add_argument("--plot", action="store_true", help="measure nothing, and show what the record holds")
    parser.add_argument("--record", type=Path, help="that is shown (default: this machine's)")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs", help="their folder (default: docs/)")
    options = parser.parse_args(arguments)
    if min(*options.sizes, options.n, options.d, options.rounds, options.threads) < 1 or options.limit <= 0:
        parser.error("--sizes, --n, --d, --rounds and --threads must be at least 1, and --limit above 0")
    if options.seconds <= 0:
        parser.error("--seconds must be above 0")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    record = Record("cpu", "cpu", LABELS)
    if options.plot:
        _show(options.record or record.path, options.pictures)
        return
    torch.set_num_threads(options.threads)
    if not cpu.levels():
        raise SystemExit(f"nothing to measure: {cpu.why_missing()}")
    n, d, rounds = options.n, options.d, options.rounds
    runs: dict[str, Callable[[], list[Row]]] = {
        "speed": lambda: speed(n, d, rounds),
        "small": lambda: small_batches(options.sizes, d, rounds, options.limit),
        "frozen": lambda: frozen(n, d, rounds),
        "peak": lambda: peak(n, (256, 512, 768, 1024), rounds),
        "parts": lambda: parts_table.parts(options.sizes, d, rounds),
        "memory": lambda: memory(2 * n, d),
        "growth": lambda: growth((n, 2 * n, *((4 * n, 8 * n) if options.long else ())), d, 3),
        "two": lambda: two.two_at_once(two.SIZES, d, rounds, two.Stretch(options.seconds)),
    }
    print(f"{record.machine}, level {cpu.level()}\n{record.environment}")
    for part in options.only:
        found = runs[part]()
        print(f"\n{part}\n{table(found)}", flush=True)
        record.add({"table": part, **row, "threads": options.threads} for row in found)
    print(f"\nwritten to {record.path}")


def _show(record: Path, folder: Path) -> None:
    """The picture, and the page's figures where the folder has the page."""
    print(plot.draw(record, folder))
    text, place = page.measured(record), folder / page.PAGE
    if place.exists():
        page.fill(place, text)
    print(place if place.exists() else text)
