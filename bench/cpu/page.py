"""What docs/performance.md shows of a record: the picture, where it was measured, and the table `small`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from .. import ROOT, Row, pictures
from ..outcomes import MEASURED, UNTRIED
from ..pictures import Chosen
from .plot import LOOKS, PICTURE, called
from .small import CPU

PAGE = "performance.md"
BEGIN = "<!-- python -m bench cpu --plot writes what stands from here on -->"
END = "<!-- up to here -->"
WIDEST = 100  # columns of a line of prose


def fill(page: Path, text: str) -> None:
    """Put the text between the page's BEGIN and END. Raises SystemExit where it has no such place."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no place for figures: a line {BEGIN!r} and below it a line {END!r}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def measured(record: Path) -> str:
    """The Markdown. Raises SystemExit where there is no record or nothing of `small` in it was measured."""
    found = pictures.read(record, "cpu")
    chosen = Chosen.of(record, found, [row for row in found["rows"] if row["table"] == "small"])
    source = record.resolve().relative_to(ROOT) if record.resolve().is_relative_to(ROOT) else record.name
    parts = [f"![time by batch size]({PICTURE})", textwrap.fill(f"{chosen.title} (rows in {source}).", WIDEST)]
    for dtype in dict.fromkeys(row["dtype"] for row in chosen.rows):
        parts += [f"### {dtype}", _table([row for row in chosen.rows if row["dtype"] == dtype])]
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    """A line for each loss and size, a column for each contender."""
    contenders = [name for name in LOOKS if any(row["contender"] == name for row in rows)]
    heads = ["loss", "N", *map(called, contenders), "times as fast as dense in float32", "goal"]
    lines = [heads, ["---"] * len(heads)]
    for loss, n in sorted({(row["loss"], row["n"]) for row in rows}):
        cells = {row["contender"]: row for row in rows if (row["loss"], row["n"]) == (loss, n)}
        ours = cells.get(CPU, {})
        ratio, goal = ours.get("over dense float32"), ours.get("goal")
        lines.append([loss, str(n), *(_cell(cells.get(name)) for name in contenders)])
        lines[-1].append("" if ratio is None else f"{ratio:.2f}")
        lines[-1].append("" if goal is None else f"{goal:g}" + ("" if ours["reached"] is not False else ", missed"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(row: Row | None) -> str:
    """Time and errors, or why there is no time."""
    if row is None:
        return ""
    if row["outcome"] != MEASURED:
        return f"no time: {row['outcome'].removeprefix(UNTRIED)}"
    errors = ", ".join(f"{row[f'{what} error']:.0e}".replace("e-0", "e-") for what in ("loss", "gradient"))
    return f"{_duration(row['seconds']['median'])} ({errors})"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
