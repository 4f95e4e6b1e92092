"""`python -m train robustness`: effective robustness, the accuracy under a shift beyond what the accuracy without it
lets one expect (Taori et al. 2020).

Between models that differ in accuracy alone, logit(accuracy on the shifted set) is close to a linear function of
logit(accuracy on the set without a shift). That line is fitted by least squares to reference models; the effective
robustness of a model is how far its accuracy lies above it, in points.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import PROGRAM
from ..data import DataError
from ..files import words
from .results import read_results

FEWEST = 3  # reference models: a line passes through any two
TICKS = (0.001, 0.01, 0.02, 0.05, *(tenth / 10 for tenth in range(1, 10)), 0.95, 0.98, 0.99, 0.999)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} robustness",
        description="How far models lie above the line that reference models' accuracies on a shifted set make over "
        "those on a set without a shift, on logit axes. Models are runs that were evaluated, evaluation.json files, or "
        "files of clip_benchmark's.",
    )
    parser.add_argument("--in", required=True, dest="standard", metavar="SET", help="the set without a shift")
    parser.add_argument("--shift", required=True, dest="shifted", metavar="SET", help="the shifted set")
    parser.add_argument("--metric", default="acc1", help="the accuracy, a share of 1 (default: %(default)s)")
    parser.add_argument(
        "--reference", required=True, type=Path, nargs="+", metavar="MODEL", help=f"{FEWEST} models or more"
    )
    parser.add_argument("--models", required=True, type=Path, nargs="+", metavar="MODEL", help="what is compared")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture; its ending says of which kind")
    options = parser.parse_args(arguments)
    shift = Shift(options.standard, options.shifted, options.metric)
    try:
        references, models = (
            [read_point(path, shift) for path in some] for some in (options.reference, options.models)
        )
        line = fit(references)
        print(text(shift, line, references, models), flush=True)
        if options.plot is not None:
            plot(options.plot, shift, line, references, models)
            print(options.plot)
    except (DataError, OSError, ValueError) as error:  # ValueError: matplotlib knows no such ending
        print(f"error: {words(error)}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Shift:
    """What is compared: `metric` on the set `standard`, which has no shift, and on the set `shifted`."""

    standard: str
    shifted: str
    metric: str


@dataclass(frozen=True)
class Point:
    """A model's accuracies on the two sets, as shares of 1."""

    name: str
    standard: float
    shifted: float


@dataclass(frozen=True)
class Line:
    """logit(shifted) = slope · logit(standard) + intercept."""

    slope: float
    intercept: float

    def expected(self, standard: float) -> float:
        """The shifted accuracy that the line gives for an accuracy within 0 and 1."""
        return expit(self.slope * logit(standard) + self.intercept)

    def robustness(self, point: Point) -> float:
        """Effective robustness, in points."""
        return 100 * (point.shifted - self.expected(point.standard))


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def expit(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))  # 1 / (1 + exp(-value)), which overflows


def fit(references: Sequence[Point]) -> Line:
    """The least-squares line through the reference models, whose accuracies lie within 0 and 1. Raises DataError where
    they give no line."""
    if len(references) < FEWEST:
        raise DataError(f"{len(references)} reference models; allowed: {FEWEST} or more, for a line has two parameters")
    for point in references:
        _check_within(point.name, point.shifted)
    if len({point.standard for point in references}) == 1:
        raise DataError(
            f"all {len(references)} reference models have accuracy {references[0].standard} without a shift, which "
            "gives no line; give models that differ, for example trained on more and on fewer pairs"
        )
    slope, intercept = statistics.linear_regression(
        [logit(point.standard) for point in references], [logit(point.shifted) for point in references]
    )
    return Line(slope, intercept)


def read_point(path: Path, shift: Shift) -> Point:
    """A model's accuracies from what results.read_results can read. Raises DataError where they are not there, or have
    no place over the line."""
    results, metric = read_results(path), shift.metric
    found = []
    for name in (shift.standard, shift.shifted):
        if name not in results:
            raise DataError(f"{path} has no results of the set {name!r}; allowed: {', '.join(results)}")
        if metric not in results[name]:
            raise DataError(f"{path} has no --metric {metric} of {name}; allowed: {', '.join(results[name])}")
        accuracy = results[name][metric]
        if not 0 <= accuracy <= 1:
            raise DataError(f"{path}: {metric} of {name} is {accuracy}; allowed: a share of 1, as accuracies are")
        found.append(accuracy)
    _check_within(str(path), found[0])
    return Point(str(path), *found)


def text(shift: Shift, line: Line, references: Sequence[Point], models: Sequence[Point]) -> str:
    """The line and how close the reference models lie to it, and a table of all models in Markdown."""
    squares = sum(line.robustness(point) ** 2 for point in references)
    lines = [
        f"{shift.metric} in percent. {len(references)} reference models give logit({shift.shifted}) = "
        f"{line.slope:.3f} · logit({shift.standard}) {line.intercept:+.3f}, and lie "
        f"{math.sqrt(squares / (len(references) - 2)):.2f} points around it (residual standard error).",
        "",
        f"| model | {shift.standard} | {shift.shifted} | expected | effective robustness |",
        "| --- | --: | --: | --: | --: |",
    ]
    for points, kind in ((models, ""), (references, " (reference)")):
        for point in points:
            shares = (point.standard, point.shifted, line.expected(point.standard))
            cells = [point.name + kind, *(f"{100 * share:.2f}" for share in shares), f"{line.robustness(point):+.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, shift: Shift, line: Line, references: Sequence[Point], models: Sequence[Point]) -> None:
    """All models and the line on logit axes, as a picture. A model that finds nothing or everything under the shift is
    drawn at the edge."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    everyone = (*references, *models)
    across, up = _limits([point.standard for point in everyone]), _limits([point.shifted for point in everyone])
    steps = [expit(value) for value in np.linspace(logit(across[0]), logit(across[1]), 101)]
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="logit", yscale="logit")
    axes.plot(steps, [line.expected(step) for step in steps], color="grey", label="line of the reference models")
    axes.plot(steps, steps, ":", color="grey", label="no drop")
    axes.plot(*_places(references, up), "o", color="grey", label="reference models")
    for number, point in enumerate(models):
        label = f"{point.name} ({line.robustness(point):+.1f})"
        axes.plot(*_places([point], up), "D", color=f"C{number % 10}", label=label, clip_on=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(TICKS))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
    axes.set(xlim=across, ylim=up)
    axes.set(xlabel=f"{shift.metric} on {shift.standard}, %", ylabel=f"{shift.metric} on {shift.shifted}, %")
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=120)


def _limits(shares: Sequence[float]) -> tuple[float, float]:
    """Around all shares that have a logit."""
    logits = [logit(share) for share in shares if 0 < share < 1]
    return expit(min(logits) - 0.5), expit(max(logits) + 0.5)


def _places(points: Sequence[Point], up: tuple[float, float]) -> tuple[list[float], list[float]]:
    return [point.standard for point in points], [min(max(point.shifted, up[0]), up[1]) for point in points]


def _check_within(name: str, accuracy: float) -> None:
    if not 0 < accuracy < 1:
        raise DataError(f"{name} has accuracy {accuracy}, which has no logit; leave that model out, or use larger sets")


if __name__ == "__main__":
    sys.exit(main())
