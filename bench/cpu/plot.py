"""docs/cpu_time.png, from a record: time of forward and backward by batch size, a panel for each dtype, a line for each
contender and loss (PSD dashed).

The table `small` gives the points; at sizes that it lacks `speed` does, of the contenders that are the same there.
What has no point is named below the panels with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import Row, pictures
from ..outcomes import MEASURED
from ..pictures import BLUE, ORANGE, PINK, RED, Chosen, Picture
from ..problems import BUILT_IN, PIECES, SCALE, fewest_pieces
from .small import CPU, DENSE, DENSE_IN_FLOAT32, LOSSES

PICTURE = "cpu_time.png"
LOOKS = {  # colour, marker, width
    CPU: (BLUE, "o", 2.5),
    DENSE: (RED, "s", 1.2),
    DENSE_IN_FLOAT32: (ORANGE, "D", 1.2),
    BUILT_IN: (PINK, "P", 1.2),
}
CALLED = {CPU: "softclip_kernels"}  # where a reader knows another name than the record


def draw(record: Path, folder: Path) -> Path:
    """The picture's path. Raises SystemExit where there is no record or nothing of `small` in it was measured."""
    found = pictures.read(record, "cpu")
    small = [row for row in found["rows"] if row["table"] == "small"]
    large = _from_speed(found["rows"], small)
    chosen = Chosen.of(record, found, [*small, *large])
    notes = [chosen.title, *pictures.absent(chosen.rows, line), *chosen.left_out]
    if sizes := sorted({row["n"] for row in chosen.rows if row["table"] == "speed"}):
        notes.append(f"from the table speed: N = {', '.join(map(str, sizes))}")
    every = [line({"contender": contender, "loss": loss}) for contender in LOOKS for loss in LOSSES]
    path = folder / PICTURE
    Picture(chosen.rows, line, _draw, {name: name for name in every}, notes).save(path, "forward + backward, seconds")
    return path


def called(contender: str) -> str:
    return CALLED.get(contender, contender)


def line(row: Row) -> str:
    """The name of the line that a row of `small` belongs to."""
    return f"{called(row['contender'])}, {row['loss']}"


def _from_speed(rows: Sequence[Row], small: Sequence[Row]) -> list[Row]:
    """The rows of `speed` as rows of `small`, whose widths and threads they have, where `small` has none."""
    settings = {(row["d"], row["threads"]) for row in small}
    known = {_identity(row) for row in small}
    found: list[Row] = []
    for row in rows:
        same = (row["d"], row["threads"]) in settings and row["loss"] in LOSSES
        if row["table"] == "speed" and (row["pass"], row["scale"]) == ("forward + backward", SCALE) and same:
            contenders = [CPU, DENSE] if fewest_pieces(row["n"], row["d"]) < PIECES else [CPU, DENSE, BUILT_IN]
            for contender in contenders:
                if isinstance(row.get(contender), Mapping):  # not the reason why there is none
                    found.append(row | {"contender": contender, "outcome": MEASURED, "seconds": row[contender]})
    return [row for row in found if _identity(row) not in known]


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[label] for label in ("contender", "loss", "dtype", "n", "d", "threads"))


def _draw(panel: Any, name: str, rows: Sequence[Row]) -> Any:
    colour, marker, width = LOOKS[rows[0]["contender"]]
    hard = rows[0]["loss"] == "hard"
    (drawn,) = panel.plot(
        [row["n"] for row in rows],
        [row["seconds"]["median"] for row in rows],
        "-" if hard else "--",
        marker=marker,
        color=colour,
        markerfacecolor=colour if hard else "white",
        linewidth=width,
        markersize=5,
    )
    return drawn
