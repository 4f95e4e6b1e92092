"""What the benchmarks' pictures of a record share: which rows are drawn, a panel for each dtype, a line for each
contender, and below the panels what has no point, with its reason.

Colours are those of Okabe and Ito, which nobody confuses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import Row
from .outcomes import MEASURED, UNTRIED

BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
ORANGE, RED, PINK, BLACK = "#E69F00", "#D55E00", "#CC79A7", "#000000"


def read(record: Path, command: str) -> Row:
    """A record as it was written (records.py). Raises SystemExit where there is none."""
    if not record.exists():
        raise SystemExit(f"{record} is not there: python -m bench {command} measures it, --record FILE names another")
    found: Row = json.loads(record.read_text())
    return found


@dataclass(frozen=True)
class Chosen:
    """The rows of the newest run's width and threads, by dtype and size; where they were measured; and a note on each
    setting whose rows are left out."""

    rows: list[Row]
    d: int
    threads: int
    title: str
    left_out: list[str]

    @staticmethod
    def of(record: Path, found: Row, rows: Sequence[Row]) -> Chosen:
        """Of these rows of a record that `read` found. Raises SystemExit where none of them was measured."""
        if all(row["outcome"] != MEASURED for row in rows):
            raise SystemExit(f"{record}: nothing in it was measured")
        newest = max(rows, key=lambda row: row["run"])
        d, threads = setting = newest["d"], newest["threads"]
        chosen = [row for row in rows if (row["d"], row["threads"]) == setting]
        commits = ", ".join(dict.fromkeys(found["runs"][row["run"]]["commit"] for row in chosen))
        versions = found["runs"][newest["run"]]["versions"]
        many = f"{threads} thread{'s' if threads > 1 else ''}"
        title = f"{found['machine']}, {many}, D = {d}, torch {versions['torch']}, commit {commits}"
        others = sorted({(row["d"], row["threads"]) for row in rows} - {setting})
        left_out = [f"not drawn: the record's rows of D = {d} with {threads} threads" for d, threads in others]
        return Chosen(
            sorted(chosen, key=lambda row: (row["dtype"] != "float32", row["n"])), d, threads, title, left_out
        )


def absent(rows: Sequence[Row], line: Callable[[Row], str]) -> list[str]:
    """Of every line that has no point somewhere: where, and why."""
    sizes: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        if row["outcome"] != MEASURED:
            reason = row["outcome"].removeprefix(UNTRIED)
            sizes.setdefault((row["dtype"], line(row), reason), []).append(row["n"])
    return [
        f"no point: {name}, {dtype}, N = {', '.join(map(str, sorted(where)))}: {reason}"
        for (dtype, name, reason), where in sizes.items()
    ]


@dataclass(frozen=True)
class Picture:
    """A panel for each dtype, both axes logarithmic, N from left to right.

    rows    those measured have a point
    line    the name of the line that a row belongs to
    draw    one line's rows into a panel; returns what the legend shows
    legend  what it calls every line, in its order
    notes   below the panels
    """

    rows: Sequence[Row]
    line: Callable[[Row], str]
    draw: Callable[[Any, str, Sequence[Row]], Any]
    legend: Mapping[str, str]
    notes: Sequence[str]

    def save(self, path: Path, label: str) -> None:
        """`label` is the vertical axis's."""
        from matplotlib.figure import Figure
        from PIL import Image

        dtypes = list(dict.fromkeys(row["dtype"] for row in self.rows))
        figure = Figure(figsize=(5.2 * len(dtypes), 6.6 + 0.16 * len(self.notes)), layout="constrained")
        panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        drawn: dict[str, Any] = {}
        for panel, dtype in zip(panels, dtypes, strict=True):
            for name, points in self._lines(dtype).items():
                drawn.setdefault(name, self.draw(panel, name, points))
            _axes(panel, dtype, sorted({row["n"] for row in self.rows}))
        panels[0].set_ylabel(label)
        figure.legend(
            [drawn[name] for name in self.legend if name in drawn],
            [said for name, said in self.legend.items() if name in drawn],
            loc="outside upper center",
            ncols=3,
            fontsize="small",
            frameon=False,
        )
        figure.supxlabel("\n".join(self.notes), x=0.01, ha="left", fontsize="x-small", color="0.3")
        figure.savefig(path, dpi=110)
        with Image.open(path) as picture:  # a quarter of the bytes
            few = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
        few.save(path, optimize=True)

    def _lines(self, dtype: str) -> dict[str, list[Row]]:
        """What was measured, by line."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row["dtype"] == dtype and row["outcome"] == MEASURED:
                found.setdefault(self.line(row), []).append(row)
        return found


def _axes(panel: Any, dtype: str, sizes: Sequence[int]) -> None:
    panel.set(xscale="log", yscale="log", xlabel="N", title=dtype)
    panel.set_xticks(sizes, [str(n) for n in sizes])
    panel.set_xticks([], minor=True)
    panel.grid(color="0.9")
