"""Two settings or source trees beside each other on a GPU: each in a process of its own, timed in turns."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import ROOT, Row, compare, problems
from ..compare import Side, Tree
from ..problems import Case


@dataclass(frozen=True)
class Setting:
    """A source tree and what is added to its process's environment, such as {"SOFTCLIP_CANDIDATE": ...}."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    path: Path = ROOT

    @staticmethod
    def parse(text: str) -> Setting:
        """NAME=PATH is a tree where that is a folder; NAME=VALUE with a NAME in capitals, an environment variable;
        anything else names a candidate, as SOFTCLIP_CANDIDATE does."""
        name, equals, value = text.partition("=")
        if equals and Path(value).is_dir():
            return Setting(name, path=Path(value).resolve())
        return Setting(text, {name: value} if equals and name.isupper() else {"SOFTCLIP_CANDIDATE": text})


def ab(base: Setting, against: Setting, case: Case, rounds: int = 7, limit: float = 170.0) -> list[Row]:
    """One row: the seconds of both, and the speedup (above 1, `against` is faster) with its quartiles. Both are found
    to be right before: by the library's standard at 1000 rows at most, by each other at the size itself. One that is
    wrong, fails or is not done after `limit` seconds is a row with its error. To be called in the main thread."""
    row: Row = {"kind": "ab", "base": base.name, "against": against.name, **case.labels()}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            with _within(limit):
                sides = []
                for index, setting in enumerate((base, against)):
                    own = Path(folder) / str(index)
                    own.mkdir()
                    # What one setting's tuner chooses is not the other's choice.
                    environment = {"XDG_CACHE_HOME": str(own), **setting.environment}
                    sides.append(stack.enter_context(Side(Tree(setting.name, setting.path), environment, own)))
                return [row | {"same bits": _agree(sides, case)} | compare.measure(sides, case, rounds)]
        except (SystemExit, OSError) as failure:  # of a side; of what is sent to one that has ended; of the limit
            return [row | {"passed": False, "error": str(failure)}]


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """TimeoutError in the block after so many seconds, also where it waits for an answer that never comes."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not finished after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _agree(sides: Sequence[Side], case: Case) -> bool:
    """Whether both sides' results have the same bits. A wrong one ends the program (SystemExit)."""
    same = compare.check(sides, replace(case, n=min(case.n, compare.CHECKED)))
    if case.n <= compare.CHECKED:
        return same
    x, y, scale = (leaf.detach() for leaf in case.operands())
    results = {}
    for which, side in zip(("base", "against"), sides, strict=True):
        side.take(case)
        results[which] = side.result()
    try:
        problems.check_equal(results, x, y, scale)
    except AssertionError as error:
        raise SystemExit(f"{error}; nothing was timed") from None
    return not results["base"].differing(results["against"])
