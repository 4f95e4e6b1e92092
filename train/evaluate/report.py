"""What an evaluation found: a table in Markdown, and the same figures as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data import count_bad
from ..files import write_atomically
from . import SetResult
from .retrieval import DEPTHS
from .sets import Evaluation

TABLE, FIGURES = "evaluation.md", "evaluation.json"


def table(results: dict[str, SetResult]) -> str:
    """Markdown; numbers in percent."""
    lines = [
        "| set | images | captions | image → text R@1 / 5 / 10 | text → image R@1 / 5 / 10 | chance R@1 "
        "| zero-shot class | chance | majority |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, result in results.items():
        ways, zero_shot = (result.image_to_text, result.text_to_image), result.zero_shot
        recalls = [" / ".join(f"{100 * way.recall[depth]:.1f}" for depth in DEPTHS) for way in ways]
        chances = " / ".join(f"{100 * way.chance:.2f}" for way in ways)
        shares = [f"{100 * share:.1f}" for share in asdict(zero_shot).values()] if zero_shot else ["–"] * 3
        lines.append(f"| {' | '.join([name, str(result.images), str(result.captions), *recalls, chances, *shares])} |")
    return "\n".join(lines)


def text(results: dict[str, SetResult], evaluation: Evaluation) -> str:
    """The table, and what it was not computed on."""
    bad = [f"{name}: {count_bad(pairs.left_out)}" for name, pairs in evaluation.sets.items()]
    return f"{table(results)}\n\nBad samples left out: {'; '.join(bad)}."


def write(run: Path, folder: Path, results: dict[str, SetResult], evaluation: Evaluation) -> None:
    """evaluation.md and evaluation.json in the run; `folder` is the checkpoint's."""
    page = f"# {run.name}, {folder.name}\n\nIn percent; held-out data only.\n\n{text(results, evaluation)}\n"
    write_atomically(run / TABLE, page.encode())
    figures = {
        "checkpoint": folder.name,
        "sets": {name: _figures(result) for name, result in results.items()},
        "left_out": {name: pairs.left_out for name, pairs in evaluation.sets.items()},
    }
    write_atomically(run / FIGURES, json.dumps(figures, indent=1).encode())


def _figures(result: SetResult) -> dict[str, Any]:
    """Flat but for the retrieval."""
    fields = asdict(result)
    zero_shot = fields.pop("zero_shot")
    if zero_shot is None:
        return fields
    shares = {f"zero_shot_{name}": zero_shot[name] for name in ("chance", "majority")}
    return {**fields, "zero_shot": zero_shot["accuracy"], **shares}
