"""What an evaluation found: a table in Markdown, and the same figures as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data import HeldOut, describe_bad
from ..data.run_data import HELD_OUT
from ..files import write_atomically
from . import SplitResult
from .retrieval import DEPTHS

TABLE, FIGURES = "evaluation.md", "evaluation.json"


def table(results: dict[str, SplitResult]) -> str:
    """Markdown; numbers in percent."""
    lines = [
        "| split | images | captions | image → text R@1 / 5 / 10 | text → image R@1 / 5 / 10 | chance R@1 "
        "| zero-shot group | chance | majority |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for split, result in results.items():
        ways, zero_shot = (result.image_to_text, result.text_to_image), result.zero_shot
        recalls = [" / ".join(f"{100 * way.recall[depth]:.1f}" for depth in DEPTHS) for way in ways]
        chances = " / ".join(f"{100 * way.chance:.2f}" for way in ways)
        shares = [f"{100 * share:.1f}" for share in (zero_shot.accuracy, zero_shot.chance, zero_shot.majority)]
        cells = [HELD_OUT[split], str(result.images), str(result.captions), *recalls, chances, *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def text(results: dict[str, SplitResult], held_out: HeldOut) -> str:
    """The table, and what it was not computed on."""
    bad_samples = [f"{HELD_OUT.get(split, split)}: {describe_bad(bad)}" for split, bad in held_out.left_out.items()]
    return f"{table(results)}\n\nBad samples left out: {'; '.join(bad_samples)}."


def write(run: Path, folder: Path, results: dict[str, SplitResult], held_out: HeldOut) -> None:
    """evaluation.md and evaluation.json in the run; `folder` is the checkpoint's."""
    page = f"# {run.name}, {folder.name}\n\nIn percent; held-out data only.\n\n{text(results, held_out)}\n"
    write_atomically(run / TABLE, page.encode())
    figures = {
        "checkpoint": folder.name,
        "splits": {split: _figures(result) for split, result in results.items()},
        "left_out": held_out.left_out,
    }
    write_atomically(run / FIGURES, json.dumps(figures, indent=1).encode())


def _figures(result: SplitResult) -> dict[str, Any]:
    """Flat but for the retrieval, as evaluation.json has always held it."""
    fields = asdict(result)
    zero_shot = fields.pop("zero_shot")
    return {
        **fields,
        "zero_shot": zero_shot["accuracy"],
        "zero_shot_chance": zero_shot["chance"],
        "zero_shot_majority": zero_shot["majority"],
    }
