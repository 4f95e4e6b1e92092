"""`python -m train plot RUN…`: a run's curves as a picture, or several runs' together."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import PROGRAM
from .files import words
from .metrics import METRICS, read_rows

PLOT = "curves.png"
WAYS = {"image_to_text": "image → text", "text_to_image": "text → image"}
STYLES = dict(zip(WAYS, ("-", "--"), strict=True))
HELD_OUT = re.compile(rf"(\w+)_r1_({'|'.join(WAYS)})")  # by the name of what is evaluated on
Rows = list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} plot", description="Draw the loss, α and R@1 of a run, or of several together."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, for example runs/emoji-1")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the picture; its ending says of which kind (default: RUN/{PLOT}, or {PLOT} here for several runs)",
    )
    options = parser.parse_args(arguments)
    lacking = [run for run in options.runs if not (run / METRICS).exists()]
    if lacking:
        print(f"error: {lacking[0]}: no {METRICS} there; give the folder of a run", file=sys.stderr)
        return 2
    try:
        print(plot(options.runs, options.out))
    except (OSError, ValueError) as error:  # ValueError: matplotlib knows no such ending
        print(f"error: {words(error)}", file=sys.stderr)
        return 2
    return 0


def plot(runs: Sequence[Path], out: Path | None = None) -> Path:
    """The curves of the runs over their steps; returns the picture's path."""
    from matplotlib.figure import Figure

    read = {run: read_rows(run / METRICS) for run in runs}
    if len(read) == 1:
        figure = Figure(figsize=(8, 7), layout="constrained")
        ((run, rows),) = read.items()
        _draw_one(figure, rows)
        figure.suptitle(run.resolve().name)
        path = out or run / PLOT
    else:
        figure = Figure(figsize=(12, 7), layout="constrained")
        _draw_several(figure, {name: read[run] for name, run in zip(_names(list(read)), read, strict=True)})
        path = out or Path(PLOT)
    figure.savefig(path, dpi=120)
    return path


def _draw_one(figure: Any, rows: Rows) -> None:
    """Loss and α above, R@1 below."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(*_curve(rows, "loss"), color="tab:blue", label="loss")
    upper.set_ylabel("loss")
    share = upper.twinx()
    share.plot(*_curve(rows, "alpha"), color="tab:orange", label="α (soft share)")
    share.set(ylabel="α", ylim=(0, 1))
    upper.legend(handles=[*upper.lines, *share.lines], loc="upper right")
    for way, arrow in WAYS.items():
        lower.plot(*_curve(rows, f"r1_{way}"), label=f"in batch, {arrow}", alpha=0.7)
    for column, name, way in _held_out(rows):
        lower.plot(*_points(rows, column), marker="o", label=f"{name}, {WAYS[way]}")
    lower.set(xlabel="step", ylabel="R@1", ylim=(0, 1))
    lower.legend(loc="upper left")


def _draw_several(figure: Any, runs: dict[str, Rows]) -> None:
    """A panel for each figure, a colour for each run, a style for each way, and of what is evaluated on a marker for
    each."""
    (loss, share), (in_batch, held_out) = figure.subplots(2, 2, sharex=True)
    evaluated = list(dict.fromkeys(name for rows in runs.values() for _, name, _ in _held_out(rows)))
    for number, rows in enumerate(runs.values()):
        colour = f"C{number % 10}"
        loss.plot(*_curve(rows, "loss"), color=colour)
        share.plot(*_curve(rows, "alpha"), color=colour)
        for way in WAYS:
            in_batch.plot(*_curve(rows, f"r1_{way}"), STYLES[way], color=colour, alpha=0.7)
        for column, name, way in _held_out(rows):
            marker = "os^Dv"[evaluated.index(name) % 5]
            held_out.plot(*_points(rows, column), STYLES[way], marker=marker, color=colour)
    loss.set(ylabel="loss")
    share.set(ylabel="α (soft share)", ylim=(0, 1))
    solid, dashed = WAYS.values()
    for panel, of in ((in_batch, "in the batch"), (held_out, f"on {', '.join(evaluated) or 'held-out data'}")):
        panel.set(xlabel="step", ylabel=f"R@1 {of}", ylim=(0, 1), title=f"{solid} solid, {dashed} dashed")
    figure.legend(loss.lines, runs, loc="outside upper center", ncols=min(len(runs), 4))


def _names(runs: list[Path]) -> list[str]:
    """The folders' names where they differ, else their paths."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _held_out(rows: Rows) -> list[tuple[str, str, str]]:
    """Columns of R@1 on what a run was evaluated on, with its name and the way, in the order of their coming."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [(column, found[1], found[2]) for column in columns if (found := HELD_OUT.fullmatch(column))]


def _curve(rows: Rows, column: str) -> tuple[list[int], list[float]]:
    """Of the steps that were trained; where a number is missing the curve has a gap."""
    trained = [row for row in rows if "loss" in row]
    return [row["step"] for row in trained], [_number(row.get(column)) for row in trained]


def _points(rows: Rows, column: str) -> tuple[list[int], list[float]]:
    """Of the evaluations, over the steps that were done by then."""
    measured = [row for row in rows if column in row]
    return [row["step"] + 1 for row in measured], [_number(row[column]) for row in measured]


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else math.nan


if __name__ == "__main__":
    sys.exit(main())
