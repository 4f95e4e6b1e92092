"""From gradients to a verdict: every parameter's row, the findings in words, and both as a table to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from .defects import Part, factor_words, fit, norm, total, uniform_words

FLOOR = 1e-3  # of all gradients' norm together: a parameter's whose exact gradient is smaller counts as of that size
TINY = 1e-300  # in the place of a size where everything exact is 0
NAMED = 3  # parameters of a line of the table that are named; the others are counted


@dataclass(frozen=True)
class Row:
    """One parameter. g is the mean over ranks of the gradients found, G the exact one, and sizes are relative to |G|,
    of which at least FLOOR of all parameters' together is taken.

    ratio       <g, G> / <G, G>: 1 where g is right, NaN where G is nothing
    error       |g - ratio G|: how far g points elsewhere
    difference  |g - G|: what the tolerance is for
    between     the largest |g_rank - g|: how far ranks differ from one another
    missing     the ranks without a gradient
    """

    name: str
    shape: tuple[int, ...]
    ratio: float
    error: float
    difference: float
    between: float
    missing: tuple[int, ...]
    ok: bool


@dataclass(frozen=True)
class Report:
    """What check_exact found; every rank has the same. `ok`: exact. `print(report)` shows the table.

    rows        one of each parameter that learns, in the model's order
    findings    what is wrong, in words, with the way out; empty where all is exact
    loss        the mean over ranks of the loss that the step returned, NaN where it returned none
    exact_loss  of the whole batch, in float64
    samples     of each rank
    tolerance   up to which a row's difference and `between` pass
    """

    rows: tuple[Row, ...]
    findings: tuple[str, ...]
    loss: float
    exact_loss: float
    samples: tuple[int, ...]
    tolerance: float
    micro_batches: int | None = None

    @property
    def ok(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        ranks = len(self.samples)
        wrong = sum(not row.ok for row in self.rows)
        verdict = "exact" if self.ok else "NOT exact"
        if wrong:
            verdict += f": {wrong} of {len(self.rows)} gradients are wrong"
        who = f"{ranks} ranks of {_enumerated(self.samples)} samples" if ranks > 1 else f"{self.samples[0]} samples"
        lines = [f"{verdict} ({who}, tolerance {self.tolerance:g})"]
        lines += [f"- {finding}" for finding in self.findings]
        said = "the step returned none" if math.isnan(self.loss) else f"{self.loss:.6f} (mean over ranks)"
        lines += ["", f"loss {said}, exact {self.exact_loss:.6f}", ""]
        lines.append(f"{'ratio':>10} {'error':>8} {'ranks':>8}  parameters")
        lines += self._table()
        lines += [
            "",
            "ratio: gradient / exact gradient; error: the part that points elsewhere; ranks: how far they differ",
        ]
        return "\n".join(lines)

    def _table(self) -> Iterator[str]:
        """Rows alike in a line."""
        groups: dict[tuple[bool, bool, str, tuple[int, ...]], list[Row]] = {}
        for row in self.rows:
            key = (row.ok, math.isnan(row.ratio), self._words(row), row.missing)
            groups.setdefault(key, []).append(row)
        for (_, nothing, words, _), rows in groups.items():
            low, high = (f"{end(row.ratio for row in rows):.4f}" for end in (min, max))
            ratio = "-" if nothing else low if low == high else f"{float(low):.2f}..{float(high):.2f}"
            error, between = (max(getattr(row, field) for row in rows) for field in ("error", "between"))
            names = _some([row.name for row in rows])
            yield f"{ratio:>10} {error:8.1e} {between:8.1e}  {names}{words and f'  <- {words}'}"

    def _words(self, row: Row) -> str:
        """What is wrong with a row, in short."""
        if row.ok:
            return "the exact gradient is 0" if math.isnan(row.ratio) else ""
        if not math.isfinite(row.difference):
            return "NaN or infinite"
        if row.missing:
            return f"no gradient on {_ranks(row.missing)}"
        said = [] if row.between <= self.tolerance else ["not reduced"]
        if math.isnan(row.ratio) or row.error > self.tolerance * max(1.0, abs(row.ratio)):
            said.append("another direction")
        elif row.difference > self.tolerance:
            said.append(uniform_words(row.ratio, len(self.samples), self.micro_batches).partition(":")[0])
        return ", ".join(said)


@dataclass(frozen=True)
class Explanation:
    """A known defect in words, and the gradient it gives through each output."""

    words: str
    parts: list[Part]


@dataclass(frozen=True)
class Truth:
    """What the reference found: the names of the parameters that learn, the exact loss, its gradient through each
    output, and, computed when asked for, those of the known defects."""

    names: Sequence[str]
    loss: float
    parts: list[Part]
    explanations: Callable[[], Iterator[Explanation]]


@dataclass(frozen=True)
class Found:
    """What the step left behind, for each parameter: every rank's gradient, None where there is none, as their mean;
    how far ranks differ, relative to the exact gradient's size; and the ranks without one. `drifted`: the parameters
    that ranks did not begin alike with."""

    mean: list[Tensor]
    between: list[float]
    missing: list[tuple[int, ...]]
    drifted: list[str]


def sizes(exact: Sequence[Tensor]) -> list[float]:
    """What each parameter's differences are relative to."""
    floor = FLOOR * norm(exact)
    return [max(each.norm().item(), floor) for each in exact]


def differences(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Of each parameter, relative to its size."""
    pairs = zip(found, exact, sizes(exact), strict=True)
    return [(a - b).norm().item() / (size or TINY) for a, b, size in pairs]


def judge(truth: Truth, found: Found, samples: Sequence[int], tolerance: float, micro_batches: int | None) -> Report:
    """The report, without the loss that the step returned."""
    rows = tuple(_rows(truth, found, tolerance))
    named = _named(truth, found, len(samples), tolerance, micro_batches)
    findings = tuple(_findings(rows, found, tolerance, named))
    return Report(rows, findings, math.nan, truth.loss, tuple(samples), tolerance, micro_batches)


def _named(truth: Truth, found: Found, ranks: int, tolerance: float, micro_batches: int | None) -> str | None:
    """What explains the mean of the ranks' gradients, whether or not it is right: "" for the exact gradient itself.
    Every defect is computed, for that says whether it would be seen."""
    candidates = chain([Explanation("", truth.parts)], truth.explanations())
    named = None
    for candidate in candidates:
        factors, near = fit(found.mean, candidate.parts)
        if named is None and max(differences(found.mean, near)) <= tolerance:
            named = ". And moreover ".join(
                filter(None, (candidate.words, factor_words(candidate.parts, factors, ranks, micro_batches)))
            )
    return named


def _rows(truth: Truth, found: Found, tolerance: float) -> Iterator[Row]:
    exact = total(truth.parts)
    everything = norm(exact)
    for name, g, right, size, between, missing in zip(
        truth.names, found.mean, exact, sizes(exact), found.between, found.missing, strict=True
    ):
        length = right.norm().item()
        ratio = (g * right).sum().item() / length**2 if length > tolerance * FLOOR * everything else math.nan
        aimed = right * (0.0 if math.isnan(ratio) else ratio)
        error, difference = ((g - each).norm().item() / size for each in (aimed, right))
        ok = max(difference, between) <= tolerance
        yield Row(name, tuple(right.shape), ratio, error, difference, between, () if ok else missing, ok)


def _findings(rows: Sequence[Row], found: Found, tolerance: float, named: str | None) -> Iterator[str]:
    if found.drifted:
        yield (
            f"ranks begin with different parameters, {_some(found.drifted)}: earlier steps were not reduced, or each "
            "rank initialised its own; load one state on all"
        )
    apart = [row.name for row in rows if row.between > tolerance]
    if apart:
        yield (
            f"not reduced: ranks keep gradients of their own, of {_some(apart)}, and would drift apart. The model was "
            "called past its wrapper (model.module(...), or a method of it that is not forward), is not wrapped, or "
            "stays in no_sync(). Way out: call the wrapper itself, as model(...)"
        )
    gone = [row for row in rows if row.missing]
    if gone:
        yield (
            f"no gradient for {_some([row.name for row in gone])} on "
            f"{_ranks(sorted({rank for row in gone for rank in row.missing}))}: detached, computed without a graph, or "
            "gathered without gradient"
        )
    wrong = [row.name for row in rows if not row.difference <= tolerance]
    if not wrong:
        if apart:
            yield "the mean over ranks is exact: nothing else is wrong"
        return
    broken = [row.name for row in rows if not math.isfinite(row.difference)]
    if broken:
        yield f"gradients that are NaN or infinite: of {_some(broken)}, where the exact ones are finite"
    elif named is not None:
        yield named or "a little off in size"
    elif not gone:
        yield (
            f"another direction, of {_some(wrong)}, and none that a known defect gives by itself: compare the loss "
            "with its reference on one process first"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _enumerated(samples: Sequence[int]) -> str:
    return f"{samples[0]}" if len(set(samples)) == 1 else " + ".join(map(str, samples))


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
