"""A training step in other people's loops, their loss beside ours: time and peak memory.

python -m bench trainers                     every host that is installed (all in .venv-hosts), N = 1024 and 4096
python -m bench trainers --hosts open_clip --sizes 2048

Every host runs its own loop (loops.py), a few steps of N rows with towers so small that the loss is what a step
consists of; with real ones a step takes its time there. Each run is a process of its own. Checked first: with our loss,
all parameters end where the host's end. Then the losses take turns, and a step counts from the first call of a tower,
when the batch is there, to the optimizer's step. The peak is how far the second step grew the process, activations and
gradients included. Rows go to bench/results/trainers/; a host that is not there or fails is a row with its reason.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .. import Row
from ..installed import missing
from ..records import Record, table
from ..short_run import Failed, forked_from
from ..timing import Timing
from .loops import HOST, LOOPS, OURS, D, Loop
from .watch import Seen, watch

LABELS = ("host", "loss", "n", "d", "threads")
APART = 1e-5  # of any parameter, in the end
PATIENCE = 300.0  # seconds that a run may take
MEASURED = "measured"


def run(loop: Loop, loss: str, n: int, threads: int) -> Seen:
    """In a process of its own, forked from one that has imported the hosts. Raises Failed."""
    worker = forked_from(f"{__name__}.hosts")
    try:
        return worker.call(watch, {"loop": loop, "loss": loss, "n": n, "threads": threads}, PATIENCE)
    finally:
        worker.end()


def measure(loop: Loop, n: int, threads: int, rounds: int) -> list[Row]:
    """A row for each loss of the loop. Where one fails, or does not train as the host's, no other is timed."""
    labels: Row = {"host": loop.name, "n": n, "d": D, "threads": threads}
    if why := missing(loop.module):
        return [{**labels, "loss": HOST, "outcome": why}]
    runs: dict[str, list[Seen]] = {loss: [] for loss in loop.losses}
    for number in range(rounds):
        for loss in loop.losses if number % 2 == 0 else reversed(loop.losses):
            try:
                runs[loss].append(run(loop, loss, n, threads))
            except Failed as failure:
                return [{**labels, "loss": loss, "outcome": str(failure)}]
        if number == 0 and (apart := distance(runs)) > APART:
            return [{**labels, "loss": OURS, "outcome": f"a parameter ends {apart:.1e} from the host's"}]
    host = statistics.median(second for seen in runs[HOST] for second in seen.seconds)
    rows = []
    for loss, seen in runs.items():
        timing = Timing.of([second for one in seen for second in one.seconds])
        peak = statistics.median(one.peak for one in seen)
        row: Row = {**labels, "loss": loss, "calls": loop.own if loss == HOST else loss, "outcome": MEASURED}
        rows.append(row | {"step": timing, "of the host's": timing.median / host, "peak MiB": peak})
    return rows


def distance(runs: dict[str, list[Seen]]) -> float:
    """The largest difference of any parameter, after the first run with the host's loss and the one with ours."""
    host, ours = runs[HOST][0].parameters, runs[OURS][0].parameters
    return float(np.abs(host - ours).max())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench trainers", description=__doc__.split("\n\n")[0])
    names = [loop.name for loop in LOOPS]
    parser.add_argument("--hosts", nargs="+", choices=names, default=names, metavar="HOST", help="(default: all)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096], help="N (default: 1024 and 4096)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    parser.add_argument("--results", type=Path, help="(default: bench/results/)")
    options = parser.parse_args(arguments)
    if min(*options.sizes, options.rounds, options.threads) < 1:
        parser.error(
            f"--sizes {options.sizes}, --rounds {options.rounds} and --threads {options.threads} must be at least 1"
        )
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    record = Record("trainers", "cpu", LABELS, options.results)
    print(f"{record.machine}, {options.threads} threads\n{record.environment}")
    for loop in LOOPS:
        if loop.name not in options.hosts:
            continue
        for n in sorted(options.sizes):
            rows = measure(loop, n, options.threads, options.rounds)
            record.add(rows)
            print(f"\n{table(rows)}", flush=True)
    print(f"\nwritten to {record.path}")
