"""The table of two processes that make the same calls on the same cores: the hard loss in float32, forward + backward.

alone     one of the processes makes its calls, the other sleeps
together  both do; a call counts where the other process made calls from before it began until after it ended
ratio     together over alone: 2 where the two share the cores, more where their threads also take them from each other

Contenders take turns within a round, and each is alone and then together: a stretch of --seconds each, after calls that
do not count. "alone" and "together" hold the medians of these stretches (together: of each process) and their median;
"ratio of means" tells of calls that a median passes over. A contender whose process fails or hangs is a row with the
reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from softclip_kernels.testing import Result

from .. import Row, problems
from ..outcomes import MEASURED
from ..problems import Case
from ..short_run import Failed, Worker
from ..timing import Timing, forward_backward
from .small import CPU, DENSE

SIZES = (256, 1024)
CONTENDERS = (CPU, DENSE)
GOAL = 2.3  # at most, of the ratio; this library's
# Seconds of calls before those that count: more than the second that the library's calls keep off OpenMP's threads
# after they met another process.
LEAD = 1.5
STARTING = 120.0  # seconds until a process has imported torch and made its first calls, at most
PATIENCE = 60.0  # seconds that a stretch may take longer than it should

Call = tuple[float, float]  # when it began and when it ended, by time.monotonic(): one clock for all processes


# What a process does.

_run: Callable[[], object] | None = None


def ready(case: Case, contender: str, threads: int) -> None:
    global _run
    torch.set_num_threads(threads)
    _run = forward_backward(case.fused("cpu") if contender == CPU else case.dense(), *case.operands())
    for _ in range(3):
        _run()


def calls(begin: float, end: float) -> list[Call]:
    """Call after call from now until `end`; those that began after `begin`."""
    assert _run is not None, "ready comes first"
    made: list[Call] = []
    stop = time.monotonic()
    while stop < end:
        start = time.monotonic()
        _run()
        stop = time.monotonic()
        if start >= begin:
            made.append((start, stop))
    return made


# What is made of it.


@dataclass(frozen=True)
class Stretch:
    """Seconds of calls that count, and of those before them."""

    seconds: float
    lead: float = LEAD


@dataclass
class Pair:
    """A contender's two processes, and the seconds of their calls by stretch. Once one of them fails both are ended."""

    contender: str
    case: Case
    workers: tuple[Worker, Worker] = field(default_factory=lambda: (Worker(), Worker()))
    alone: list[list[float]] = field(default_factory=list)
    together: list[list[float]] = field(default_factory=list)
    outcome: str = MEASURED

    def get_ready(self) -> None:
        arguments = {"case": self.case, "contender": self.contender, "threads": torch.get_num_threads()}
        self._ask(self.workers, ready, arguments, STARTING)

    def take_turn(self, number: int, stretch: Stretch) -> None:
        """Alone, each process in every second round, and together."""
        (alone,) = self._call([self.workers[number % 2]], stretch)
        both = self._call(self.workers, stretch)
        if self.outcome != MEASURED:
            return
        found = [alone, accompanied(*both), accompanied(*reversed(both))]
        if not all(found):
            self._fail(f"a call takes too long for stretches of {stretch.seconds:g} s")
            return
        first, *others = [[stop - start for start, stop in made] for made in found]
        self.alone.append(first)
        self.together += others

    def end(self) -> None:
        for worker in self.workers:
            worker.end()

    def row(self) -> Row:
        row: Row = {"contender": self.contender, **self.case.labels(), "outcome": self.outcome}
        if self.outcome != MEASURED:
            return row
        alone, together = (Timing.of([*map(statistics.median, every)]) for every in (self.alone, self.together))
        ratio = together.median / alone.median
        row |= {"alone": alone, "together": together, "ratio": ratio}
        row["ratio of means"] = _mean(self.together) / _mean(self.alone)
        row |= {"calls alone": sum(map(len, self.alone)), "calls together": sum(map(len, self.together))}
        return row | ({"goal": GOAL, "reached": ratio <= GOAL} if self.contender == CPU else {})

    def _call(self, workers: Sequence[Worker], stretch: Stretch) -> list[list[Call]]:
        begin = time.monotonic() + stretch.lead
        limit = stretch.lead + stretch.seconds + PATIENCE
        return self._ask(workers, calls, {"begin": begin, "end": begin + stretch.seconds}, limit)

    def _ask(self, workers: Sequence[Worker], function: Callable[..., object], arguments: Row, limit: float) -> list:
        """What each of them answers, at the same time; nothing where one has failed."""
        if self.outcome != MEASURED:
            return [[]] * len(workers)
        try:
            with ThreadPoolExecutor(len(workers)) as pool:
                return list(pool.map(lambda worker: worker.call(function, arguments, limit), workers))
        except Failed as failure:
            self._fail(str(failure))
            return [[]] * len(workers)

    def _fail(self, outcome: str) -> None:
        self.outcome = outcome
        self.end()


def accompanied(own: Sequence[Call], others: Sequence[Call]) -> list[Call]:
    """Those of a process's calls throughout which the other one made its own."""
    if not others:
        return []
    begin, end = others[0][0], others[-1][1]
    return [call for call in own if begin <= call[0] and call[1] <= end]


def two_at_once(sizes: Sequence[int], d: int, rounds: int, stretch: Stretch) -> list[Row]:
    """A row for each contender at each size. Raises AssertionError where one is wrong."""
    problems.check("hard", d, torch.float32, backend="cpu")
    return [row for n in sizes for row in measure(Case("hard", torch.float32, n, d), rounds, stretch)]


def measure(case: Case, rounds: int, stretch: Stretch) -> list[Row]:
    leaves = [leaf.detach() for leaf in case.operands()]
    problems.check_at_size(case, {CPU: Result.of(case.fused("cpu"), *leaves)}, *leaves)
    pairs = [Pair(contender, case) for contender in CONTENDERS]
    try:
        for pair in pairs:
            pair.get_ready()
        for number in range(rounds):
            for pair in pairs if number % 2 else reversed(pairs):
                pair.take_turn(number, stretch)
    finally:
        for pair in pairs:
            pair.end()
    return [pair.row() for pair in pairs]


def _mean(stretches: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(seconds for one in stretches for seconds in one)
