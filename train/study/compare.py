"""`python -m train compare STUDY`: what the finished runs of a study show, as a table and a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import PROGRAM, config
from ..cli import USER_ERRORS
from ..config import ConfigError
from ..files import words, write_atomically
from .comparison import USUAL, Comparison, Runs, choose_metrics, compare, read_runs
from .finished import STUDY_FILE, Lines, read_lines
from .intervals import DRAWS

HEAD = (
    "| metric | method | seeds | mean ± SD | difference | 95 % interval | of | p (Holm) | |",
    "| --- | --- | --: | --: | --: | --: | --- | --: | --- |",
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} compare",
        description="What the finished runs of a study show: the mean of each method over seeds, and its differences "
        "to the reference at the same seed, with intervals.",
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="the study's folder")
    parser.add_argument("--reference", metavar="METHOD", help="compared with (default: the study's own)")
    parser.add_argument(
        "--metric",
        action="append",
        metavar="PATTERN",
        help="of SET/METRIC, macro/METRIC for the mean over all sets, or mean/NAME for the study's own, with * for "
        f"anything; may be given several times (default: {' and '.join(USUAL)}; the study's primary metric is always "
        "there)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the differences; its ending says of which kind")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    options = parser.parse_args(arguments)
    try:
        file = options.study / STUDY_FILE
        if not file.exists():
            raise ConfigError(f"{options.study}: no {STUDY_FILE} there; give the folder of a study (`{PROGRAM} grid`)")
        given, lines = config.read(file), read_lines(options.study)
        lines = _in_order(lines, given)
        reference, primary = options.reference or given.get("reference"), given.get("primary")
        methods = list(dict.fromkeys(line["method"] for line in lines.values()))
        if lines and reference is not None and reference not in methods:
            raise ConfigError(f"--reference {reference!r}, of which no run is finished; allowed: {', '.join(methods)}")
        means = given.get("means") or {}
        runs = read_runs(options.study, lines, means)
        metrics = choose_metrics(runs, options.metric, primary)
        compared = compare(runs, reference, metrics, primary, means)
        text = describe(compared, runs, lines, reference, primary)
        print(text, flush=True)
        if options.markdown is not None:
            write_atomically(options.markdown, f"{text}\n".encode())
        if options.plot is not None:
            plot(options.plot, compared, reference)
            print(options.plot)
    except (*USER_ERRORS, OSError, ValueError) as error:  # ValueError: matplotlib knows no such ending
        print(f"error: {words(error)}", file=sys.stderr)
        return 2
    return 0


def _in_order(lines: Lines, given: Mapping[str, Any]) -> Lines:
    """The lines in the order of the study's file, whichever run was finished first."""
    conditions, methods = list(given.get("conditions") or [""]), list(given.get("runs") or [])

    def place(line: dict[str, Any]) -> tuple[int, ...]:
        names = ((line["condition"], conditions), (line["method"], methods))
        return (*(order.index(name) if name in order else len(order) for name, order in names), line["seed"])

    return dict(sorted(lines.items(), key=lambda entry: place(entry[1])))


def describe(
    compared: Sequence[Comparison], runs: Mapping[str, Runs], lines: Lines, reference: str | None, primary: str | None
) -> str:
    """A table in Markdown for each condition, and what they were made from; figures in percent."""
    parts = []
    for condition in runs:
        rows = [_row(one, primary) for one in compared if one.condition == condition]
        parts += [*([f"## {condition}\n"] if condition else []), *HEAD, *rows, ""]
    return "\n".join([*parts, *_notes(runs, lines, reference, primary)])


def _row(one: Comparison, primary: str | None) -> str:
    values = list(one.values.values())
    mean = f"{100 * np.mean(values):.1f}"
    cells = [f"**{one.metric}**" if one.metric == primary else one.metric, one.method, str(len(values))]
    cells.append(f"{mean} ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else mean)
    if not one.differences:
        return f"| {' | '.join([*cells, *['–'] * 4, ''])} |"
    if len(one.differences) < len(values):
        cells[2] = f"{len(values)} ({len(one.differences)} pairs)"
    cells.append(f"{100 * one.difference:+.1f}")
    if one.interval is None:
        return f"| {' | '.join([*cells, *['–'] * 3, 'no interval'])} |"
    p = "–" if one.p is None else f"{one.p:.3f}"
    cells += [f"[{100 * one.interval.low:+.1f}, {100 * one.interval.high:+.1f}]", one.interval.method, p, shown(one)]
    return f"| {' | '.join(cells)} |"


def shown(one: Comparison) -> str:
    """What the interval of a comparison lets one say."""
    if one.interval is None or one.interval.holds_zero:
        return "not shown"
    return "higher" if one.difference > 0 else "lower"


def _notes(runs: Mapping[str, Runs], lines: Lines, reference: str | None, primary: str | None) -> list[str]:
    """What one must know to read the tables."""
    notes = ["In percent. SD: over seeds."]
    if reference is None:
        return [f"{notes[0]} No differences: the study names no `reference`, and --reference is not given."]
    families = "all comparisons" if primary is None else f"those of {primary}, and over all others"
    notes.append(
        f"Differences to {reference} at the same seed, in points; of two 95 % intervals, t over seeds and a bootstrap "
        f"of {DRAWS:,} draws over seeds and test concepts, the wider one. p: the larger of both, after Holm over "
        f"{families}."
    )
    without = sum(not records for of in runs.values() for seeds in of.records.values() for records in seeds.values())
    if without:
        notes.append(
            f"{without} of {len(lines)} runs have no results by record, and differences to or from these have the t "
            f"interval over seeds alone: `{PROGRAM} grid` with --evaluate-again writes them."
        )
    commits = list(dict.fromkeys(str(line["commit"] or "no commit") for line in lines.values()))
    codes = {line["fingerprint"]["code"] for line in lines.values() if line["fingerprint"]}
    others = f"; {len(codes)} versions of the code, so that not all differences may be the methods'"
    notes.append(f"Commit: {', '.join(commits)}{others if len(codes) > 1 else ''}.")
    return notes


def plot(path: Path, compared: Sequence[Comparison], reference: str | None) -> None:
    """The differences with their intervals: a panel for each condition, a row for each metric, a colour for each
    method. Raises ConfigError where there are none."""
    from matplotlib.figure import Figure

    drawn = [one for one in compared if one.differences]
    if not drawn:
        raise ConfigError("--plot: there are no differences to draw yet; see the table")
    conditions, metrics, methods = (
        list(dict.fromkeys(getattr(one, name) for one in drawn)) for name in ("condition", "metric", "method")
    )
    height = 1.5 + len(metrics) * (0.2 + 0.2 * len(methods))
    figure = Figure(figsize=(3 + 4 * len(conditions), height), layout="constrained")
    panels = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
    for panel, condition in zip(panels, conditions, strict=True):
        panel.axvline(0, color="grey", linewidth=1)
        panel.set(title=condition, xlabel=f"difference to {reference}, points")
        for one in drawn:
            if one.condition == condition:
                place = metrics.index(one.metric) + 0.8 * ((methods.index(one.method) + 0.5) / len(methods) - 0.5)
                _draw(panel, one, place, f"C{methods.index(one.method) % 10}")
    panels[0].set_yticks(range(len(metrics)), metrics)
    panels[0].invert_yaxis()
    # One of each method: a panel may lack some.
    first = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend([first[name] for name in methods], methods, loc="outside upper center", ncols=min(len(methods), 4))
    figure.savefig(path, dpi=120)


def _draw(panel: Any, one: Comparison, place: float, colour: str) -> None:
    if one.interval is not None:
        panel.plot([100 * one.interval.low, 100 * one.interval.high], [place] * 2, color=colour, linewidth=1.5)
    panel.plot([100 * one.difference], [place], "o", color=colour, label=one.method)


if __name__ == "__main__":
    sys.exit(main())
