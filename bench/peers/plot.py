"""docs/peers_time.png and docs/peers_memory.png, from a record: a panel for each dtype, a line for each peer.

What has no point is named below the panels with its reason. A peer that is not exact has hollow markers, one that
computes a single direction a dashed line. Colours are those of Okabe and Ito, which nobody confuses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import Row
from .losses import PEERS

MEASURED = "measured"  # a row's outcome where there are figures
EXCEEDED, UNTRIED = "over ", "not tried: "  # how outcomes of limits begin
SMALLEST = 1.0  # MiB that are drawn
FIGURES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "time": ("forward + backward, seconds", lambda row: row["seconds"]["median"]),
    "memory": (
        f"peak memory beyond inputs and gradients, MiB\n(less than {SMALLEST:g} is drawn as {SMALLEST:g})",
        lambda row: max(row["peak MiB"], SMALLEST),
    ),
}
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
ORANGE, RED, PINK, BLACK = "#E69F00", "#D55E00", "#CC79A7", "#000000"
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
    from matplotlib.figure import Figure
    from PIL import Image

    rows, notes = read(record)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    paths = []
    for name, (label, value) in FIGURES.items():
        figure = Figure(figsize=(5.2 * len(dtypes), 6.6 + 0.16 * len(notes)), layout="constrained")
        panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        drawn: dict[str, Any] = {}
        for panel, dtype in zip(panels, dtypes, strict=True):
            for peer, line in lines([row for row in rows if row["dtype"] == dtype]).items():
                drawn.setdefault(peer, _draw(panel, peer, line, value))
            _axes(panel, dtype, sorted({row["n"] for row in rows}))
        panels[0].set_ylabel(label)
        figure.legend(
            [drawn[peer] for peer in STYLES if peer in drawn],
            [peer + (" (one direction)" if peer in ONE_DIRECTION else "") for peer in STYLES if peer in drawn],
            loc="outside upper center",
            ncols=3,
            fontsize="small",
            frameon=False,
        )
        figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize="x-small", color="0.3")
        paths.append(folder / f"peers_{name}.png")
        figure.savefig(paths[-1], dpi=110)
        with Image.open(paths[-1]) as picture:  # a quarter of the bytes
            few = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
        few.save(paths[-1], optimize=True)
    return paths


def read(record: Path) -> tuple[list[Row], list[str]]:
    """The rows of the newest run's width and threads, by dtype and size; and what is to be said of them: where they
    were measured, and what has no point."""
    if not record.exists():
        raise SystemExit(f"{record} is not there: python -m bench peers measures it, --record FILE names another")
    found = json.loads(record.read_text())
    newest = max(found["rows"], key=lambda row: row["run"], default=None)
    if newest is None or all(row["outcome"] != MEASURED for row in found["rows"]):
        raise SystemExit(f"{record}: nothing in it was measured")
    setting = (newest["d"], newest["threads"])
    rows = [row for row in found["rows"] if (row["d"], row["threads"]) == setting]
    commits = ", ".join(dict.fromkeys(found["runs"][row["run"]]["commit"] for row in rows))
    versions = found["runs"][newest["run"]]["versions"]
    threads = f"{setting[1]} thread{'s' if setting[1] > 1 else ''}"
    title = f"{found['machine']}, {threads}, D = {setting[0]}, torch {versions['torch']}, commit {commits}"
    notes = [title, *absent(rows)]
    if any(row["outcome"] == MEASURED and row["outside"] for row in rows):
        notes.append("hollow: further from the exact gradient or loss than this library allows itself")
    others = sorted({(row["d"], row["threads"]) for row in found["rows"]} - {setting})
    notes += [f"not drawn: the record's rows of D = {d} with {threads} threads" for d, threads in others]
    return sorted(rows, key=lambda row: (row["dtype"] != "float32", row["n"])), notes


def lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What was measured of each peer."""
    return {
        peer: line
        for peer in dict.fromkeys(row["peer"] for row in rows)
        if (line := [row for row in rows if row["peer"] == peer and row["outcome"] == MEASURED])
    }


def absent(rows: Sequence[Row]) -> list[str]:
    """Of every peer that has no point somewhere: where, and why."""
    sizes: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        if row["outcome"] != MEASURED:
            reason = row["outcome"].removeprefix(UNTRIED)
            sizes.setdefault((row["dtype"], row["peer"], reason), []).append(row["n"])
    return [
        f"no point: {peer}, {dtype}, N = {', '.join(map(str, sorted(where)))}: {reason}"
        for (dtype, peer, reason), where in sizes.items()
    ]


def _draw(panel: Any, peer: str, line: Sequence[Row], value: Callable[[Row], float]) -> Any:
    colour, marker, width = STYLES[peer]
    sizes, values = [row["n"] for row in line], [value(row) for row in line]
    style = "--" if peer in ONE_DIRECTION else "-"
    (drawn,) = panel.plot(sizes, values, style, marker=marker, color=colour, linewidth=width, markersize=5)
    hollow = [(n, at) for n, at, row in zip(sizes, values, line, strict=True) if row["outside"]]
    if hollow:
        panel.plot(*zip(*hollow, strict=True), marker, color=colour, markerfacecolor="white", markersize=5)
    return drawn


def _axes(panel: Any, dtype: str, sizes: Sequence[int]) -> None:
    panel.set(xscale="log", yscale="log", xlabel="N", title=dtype)
    panel.set_xticks(sizes, [str(n) for n in sizes])
    panel.set_xticks([], minor=True)
    panel.grid(color="0.9")
