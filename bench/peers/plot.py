"""docs/peers_time.png and docs/peers_memory.png, from a record: a panel for each dtype, a line for each peer.

What has no point is named below the panels with its reason. A peer that is not exact has hollow markers, one that
computes a single direction a dashed line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import Row, pictures
from ..outcomes import MEASURED
from ..pictures import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Chosen, Picture
from .losses import PEERS

SMALLEST = 1.0  # MiB that are drawn
FIGURES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "time": ("forward + backward, seconds", lambda row: row["seconds"]["median"]),
    "memory": (
        f"peak memory beyond inputs and gradients, MiB\n(less than {SMALLEST:g} is drawn as {SMALLEST:g})",
        lambda row: max(row["peak MiB"], SMALLEST),
    ),
}
STYLES = {  # colour, marker, width
    "softclip_kernels": (BLUE, "o", 2.5),
    "softclip_kernels PSD": (BLUE, "s", 1.2),
    "open_clip": (RED, "s", 1.2),
    "torch.compile": (ORANGE, "D", 1.2),
    "checkpointed blocks": (GREEN, "v", 1.2),
    "linear_cross_entropy": (PINK, "P", 1.2),
    "linear_cross_entropy/16": (PINK, "X", 1.2),
    "softclip_kernels rows": (BLUE, "^", 2.5),
    "MNRL": (SKY, "s", 1.2),
    "cached MNRL": (SKY, "D", 1.2),
    "NTXentLoss": (BLACK, "*", 1.2),
}
ONE_DIRECTION = {peer.name for peer in PEERS if peer.loss == "rows"}


def draw(record: Path, folder: Path) -> list[Path]:
    """The pictures' paths. Raises SystemExit where there is no record or nothing in it was measured."""
    found = pictures.read(record, "peers")
    chosen = Chosen.of(record, found, found["rows"])
    notes = [chosen.title, *pictures.absent(chosen.rows, _peer)]
    if any(row["outcome"] == MEASURED and row["outside"] for row in chosen.rows):
        notes.append("hollow: further from the exact gradient or loss than this library allows itself")
    notes += chosen.left_out
    legend = {peer: peer + (" (one direction)" if peer in ONE_DIRECTION else "") for peer in STYLES}
    paths = []
    for name, (label, value) in FIGURES.items():
        paths.append(folder / f"peers_{name}.png")
        Picture(chosen.rows, _peer, partial(_draw, value), legend, notes).save(paths[-1], label)
    return paths


def _peer(row: Row) -> str:
    return str(row["peer"])


def _draw(value: Callable[[Row], float], panel: Any, peer: str, line: Sequence[Row]) -> Any:
    colour, marker, width = STYLES[peer]
    sizes, values = [row["n"] for row in line], [value(row) for row in line]
    style = "--" if peer in ONE_DIRECTION else "-"
    (drawn,) = panel.plot(sizes, values, style, marker=marker, color=colour, linewidth=width, markersize=5)
    hollow = [(n, at) for n, at, row in zip(sizes, values, line, strict=True) if row["outside"]]
    if hollow:
        panel.plot(*zip(*hollow, strict=True), marker, color=colour, markerfacecolor="white", markersize=5)
    return drawn
