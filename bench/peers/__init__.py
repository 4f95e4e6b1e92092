"""What one would use instead, side by side: time and peak memory of every loss in losses.py, by batch size.

python -m bench peers                  from N = 512 to 16384, in the hosts' environment (.venv-hosts)
python -m bench peers --plot           draw docs/peers_time.png and docs/peers_memory.png from the record
python -m bench peers --sizes 1024 --peers MNRL "cached MNRL" "softclip_kernels rows"

Every point runs in a process of its own, with a limit of memory and of time. First the peer is held to the library's
standard of correctness on 250 rows. Its first run tells its memory: how far the process grows beyond inputs and
gradients. Its gradients are compared with those of this library in float32 at the timed size. Then all peers of a size
are timed in turns; where a round takes longer than --budget, the first runs, one after another, are the only round. A
peer that is not exact is timed as well, and its row says so; one that is not installed, fails or exceeds a limit is a
row with the reason. Rows go to bench/results/peers/.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .. import ROOT, Row, memory
from ..outcomes import EXCEEDED, MEASURED, hopeless
from ..problems import Case, dtype_name
from ..records import Record, table
from ..short_run import Failed, Worker, forked_from
from ..timing import Timing, interleaved
from . import plot, point
from .losses import PEERS, Peer

LABELS = ("peer", "dtype", "n", "d", "threads")
BESIDE = {"hard": "softclip_kernels", "psd": "softclip_kernels", "rows": "softclip_kernels rows"}  # of each loss
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
GIB = 2**30
UNFINISHED = "not finished after "  # how a worker says so
COMPILING = 300.0  # seconds that a peer may take to be ready


def fresh_process() -> Worker:
    return forked_from(f"{__name__}.hosts")


@dataclass(frozen=True)
class Limits:
    """threads; bytes that a process may ask for; seconds of one run; rounds of a timing, and seconds of all of them."""

    threads: int
    memory: int
    seconds: float
    rounds: int
    budget: float


@dataclass
class Point:
    """One peer at one size, as the process that measures it is seen from here."""

    peer: Peer
    case: Case
    limits: Limits
    worker: Worker = field(default_factory=fresh_process)
    found: Row = field(default_factory=dict)
    failure: str | None = None

    def perform(self, expected: Path) -> None:
        """The first run, checked."""
        try:
            said = self.worker.call(point.ready, self._arguments(), COMPILING)
            seconds, peak = self.worker.call(point.first, {}, self.limits.seconds)
            error, outside = self.worker.call(point.compare, {"path": expected}, COMPILING)
        except Failed as failure:
            self.fail(failure)
            return
        self.found = {"seconds": Timing.of([seconds]), "peak MiB": peak, "error": error}
        wrong = {f"at N = {point.CHECKED}": said, f"at N = {self.case.n}": outside}
        self.found["outside"] = "; ".join(f"{where}: {what}" for where, what in wrong.items() if what) or None

    def again(self) -> float:
        """Seconds of one more run."""
        if self.failure is not None:
            return math.nan
        try:
            return float(self.worker.call(point.again, {}, self.limits.seconds))
        except Failed as failure:
            self.fail(failure)
            return math.nan

    def fail(self, failure: Failed) -> None:
        line = str(failure)
        asked = re.search(r"tried to allocate (\d+) bytes", line)
        if asked or "MemoryError" in line:
            wanted = f" (asked for another {int(asked[1]) / GIB:.1f} GiB)" if asked else ""
            line = f"{EXCEEDED}{self.limits.memory / GIB:g} GiB{wanted}"
        elif line.startswith(UNFINISHED):
            line = f"{EXCEEDED}{line.removeprefix(UNFINISHED)}"
        self.failure = line

    def row(self) -> Row:
        labels: Row = {
            "peer": self.peer.name,
            "version": self.peer.version(),
            "loss": self.peer.loss,
            "dtype": dtype_name(self.case.dtype),
        }
        labels |= {"n": self.case.n, "d": self.case.d, "threads": self.limits.threads}
        if self.failure is not None:
            return {**labels, "outcome": self.failure}
        return {**labels, "outcome": MEASURED, **self.found}

    def _arguments(self) -> Row:
        return {"peer": self.peer, "case": self.case, "threads": self.limits.threads, "limit": self.limits.memory}


def measure(peers: Sequence[Peer], case: Case, limits: Limits, before: dict[str, Row]) -> list[Row]:
    """A row for each peer at the case's size and dtype; `before` holds those of the size before."""
    points = [Point(peer, replace(case, loss=peer.loss), limits) for peer in peers]
    for one in points:
        one.failure = one.peer.missing() or hopeless(before.get(one.peer.name), case.n, limits.seconds)
    running = [one for one in points if one.failure is None]
    with tempfile.TemporaryDirectory() as folder:
        expected = {loss: Path(folder, loss) for loss in dict.fromkeys(one.peer.loss for one in running)}
        try:
            lacking = {
                loss: _write_reference(replace(case, loss=loss), limits, path) for loss, path in expected.items()
            }
            for one in running:
                if (failure := lacking[one.peer.loss]) is None:
                    one.perform(expected[one.peer.loss])
                else:
                    one.failure = f"nothing to compare with: {failure}"
            _time_in_turns([one for one in running if one.failure is None], limits)
        finally:
            for one in points:
                one.worker.end()
    rows = [one.row() for one in points]
    ours = {row["peer"]: row["seconds"].median for row in rows if row["outcome"] == MEASURED}
    for row in rows:
        beside = ours.get(BESIDE[row["loss"]])
        if row["outcome"] == MEASURED and beside is not None:
            row["of ours"] = row["seconds"].median / beside
    return rows


def _write_reference(case: Case, limits: Limits, path: Path) -> Failed | None:
    """None, or why there is none."""
    worker = fresh_process()
    try:
        worker.call(point.reference, {"case": case, "threads": limits.threads, "path": path}, COMPILING)
    except Failed as failure:
        return failure
    finally:
        worker.end()
    return None


def _time_in_turns(points: Sequence[Point], limits: Limits) -> None:
    """As many rounds as the budget allows; where it allows none, the first runs are all there is."""
    once = sum(one.found["seconds"].median for one in points)
    rounds = min(limits.rounds, int(limits.budget / once)) if points else 0
    if rounds == 0:
        return
    runs = {str(number): one.again for number, one in enumerate(points)}
    for one, timing in zip(points, interleaved(runs, rounds, 0, measure=lambda run: run()).values(), strict=True):
        one.found["seconds"] = timing


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench peers", description=__doc__.split("\n\n")[0])
    names = [peer.name for peer in PEERS]
    sizes = [512, 1024, 2048, 4096, 8192, 16384]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="batch sizes (default: 512 to 16384)")
    parser.add_argument("--d", type=int, default=512, help="embedding width (default: 512)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: both)")
    parser.add_argument("--peers", nargs="+", choices=names, default=names, help="(default: all)", metavar="PEER")
    parser.add_argument("--rounds", type=int, default=7, help="of the interleaved timings, at most (default: 7)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for the rounds of a size (default: 60)")
    parser.add_argument("--seconds", type=float, default=60.0, help="a run may take (default: 60)")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that a peer may ask for (default: 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    parser.add_argument("--results", type=Path, help="(default: bench/results/)")
    parser.add_argument("--plot", action="store_true", help="measure nothing, and draw what the record holds")
    parser.add_argument("--record", type=Path, help="that is drawn (default: this machine's)")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs", help="their folder (default: docs/)")
    options = parser.parse_args(arguments)
    if min(*options.sizes, options.d, options.rounds, options.threads) < 1:
        parser.error(
            f"--sizes {options.sizes}, --d {options.d}, --rounds {options.rounds} and --threads {options.threads} must "
            "be at least 1"
        )
    if min(options.seconds, options.memory) <= 0 or options.budget < 0:
        parser.error(
            f"--seconds {options.seconds:g} and --memory {options.memory:g} must be above 0, --budget not below"
        )
    if not options.plot and options.memory > (available := memory.available() / GIB):
        parser.error(f"--memory {options.memory:g}: no more than {available:.1f} GiB are free here; give less")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    record = Record("peers", "cpu", LABELS, options.results)
    if options.plot:
        for path in plot.draw(options.record or record.path, options.pictures):
            print(path)
        return
    limits = Limits(options.threads, int(options.memory * GIB), options.seconds, options.rounds, options.budget)
    peers = [peer for peer in PEERS if peer.name in options.peers]
    print(f"{record.machine}, {limits.threads} threads\n{record.environment}")
    start = time.monotonic()
    for name in options.dtypes:
        before: dict[str, Row] = {}
        for n in sorted(options.sizes):
            rows = measure(peers, Case("", DTYPES[name], n, options.d), limits, before)
            before = {row["peer"]: row for row in rows}
            record.add(rows)
            print(f"\n{table([flat(row) for row in rows])}", flush=True)
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes; written to {record.path}")


def flat(row: Row) -> Row:
    """What has a place in a table."""
    return {key: value for key, value in row.items() if key not in ("version", "loss", "d", "threads", "outside")} | {
        "exact": "" if "error" not in row else "yes" if row["outside"] is None else "no"
    }
