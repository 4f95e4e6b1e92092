"""What an evaluation found: a table in Markdown, and the same figures as JSON, under clip_benchmark's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..data import count_bad
from ..files import write_atomically
from . import SetResult
from .records import Hits, write_records
from .retrieval import DEPTHS
from .sets import Evaluation

TABLE, FIGURES = "evaluation.md", "evaluation.json"
COLUMNS = (
    "set",
    "images",
    "texts",
    "image → text R@1 / 5 / 10",
    "text → image R@1 / 5 / 10",
    "chance R@1",
    "zero-shot top-1 / top-5 / per class",
    "chance",
    "majority",
)
PROBE_COLUMNS = ("linear probe top-1 / per class", "chance", "majority")


def table(results: dict[str, SetResult]) -> str:
    """Markdown; numbers in percent. It has the probe's columns where there is one."""
    probed = any(result.probe is not None for result in results.values())
    columns = COLUMNS + PROBE_COLUMNS if probed else COLUMNS
    rows = [[name, *_cells(result)] + (_probe_cells(result) if probed else []) for name, result in results.items()]
    return "\n".join(map(_line, (columns, ("---", *("--:" for _ in columns[1:])), *rows)))


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(*shares: float | None, digits: int = 1) -> str:
    return " / ".join("–" if share is None else f"{100 * share:.{digits}f}" for share in shares)


def _cells(result: SetResult) -> list[str]:
    ways, found = (result.image_to_text, result.text_to_image), result.zero_shot
    recalls = [_percent(*way.recall.values()) for way in ways]
    chances = _percent(*(way.chance[1] for way in ways), digits=2)
    zero_shot = ["–"] * 3
    if found is not None:
        accuracy = _percent(found.acc1, found.acc5, found.mean_per_class_recall)
        zero_shot = [accuracy, _percent(1 / found.classes), _percent(found.majority)]
    return [str(result.images), str(result.texts), *recalls, chances, *zero_shot]


def _probe_cells(result: SetResult) -> list[str]:
    found = result.probe
    if found is None:
        return ["–"] * 3
    accuracy = _percent(found.acc1, found.mean_per_class_recall) + ("" if found.converged else " (not converged)")
    return [accuracy, _percent(found.chance), _percent(found.majority)]


def text(results: dict[str, SetResult], evaluation: Evaluation) -> str:
    """The table, and what it was not computed on."""
    bad = [f"{name}: {count_bad(pairs.left_out)}" for name, pairs in evaluation.sets.items()]
    return f"{table(results)}\n\nBad samples left out: {'; '.join(bad)}."


def write(
    folder: Path, towers: str, checkpoint: str | None, results: dict[str, SetResult], evaluation: Evaluation
) -> None:
    """evaluation.md, evaluation.json and evaluation-records.npz in `folder`: of these towers (model.towers), with the
    weights of a checkpoint, or of their own."""
    title = f"# {folder.name}, {checkpoint or towers}"
    page = f"{title}\n\nIn percent; held-out data only.\n\n{text(results, evaluation)}\n"
    write_atomically(folder / TABLE, page.encode())
    figures = {
        "towers": towers,
        "checkpoint": checkpoint,
        "results": [entry for name, result in results.items() for entry in entries(name, result)],
        "left_out": {name: pairs.left_out for name, pairs in evaluation.sets.items()},
    }
    write_atomically(folder / FIGURES, json.dumps(figures, indent=1).encode())
    write_records(folder, records(results))


def records(results: dict[str, SetResult]) -> dict[str, Hits]:
    """Of the metrics that are means over pictures or texts, by `SET/METRIC`."""
    found = {}
    for name, result in results.items():
        of_images, of_texts = (result.image_to_text.hits, result.text_to_image.hits)
        for index, depth in enumerate(DEPTHS):
            found[f"{name}/image_retrieval_recall@{depth}"] = Hits(result.text_labels, of_texts[:, index].numpy())
            found[f"{name}/text_retrieval_recall@{depth}"] = Hits(result.image_labels, of_images[:, index].numpy())
        if result.zero_shot is not None:
            labels, hits = result.image_labels[result.zero_shot.images.numpy()], result.zero_shot.hits.numpy()
            found |= {f"{name}/acc1": Hits(labels, hits[:, 0]), f"{name}/acc5": Hits(labels, hits[:, 1])}
    return found


def entries(name: str, result: SetResult) -> list[dict[str, Any]]:
    """Of each task of a set one mapping, with clip_benchmark's `dataset`, `task` and `metrics`: there, the images are
    retrieved by texts in image_retrieval. Beside them what a guess would get, and on how much data that is."""
    ways = {"image_retrieval": result.text_to_image, "text_retrieval": result.image_to_text}
    found: list[dict[str, Any]] = [
        {
            "dataset": name,
            "task": "zeroshot_retrieval",
            "metrics": {f"{way}_recall@{k}": one.recall[k] for way, one in ways.items() for k in DEPTHS},
            "chance": {f"{way}_recall@{k}": one.chance[k] for way, one in ways.items() for k in DEPTHS},
            "images": result.images,
            "texts": result.texts,
        }
    ]
    if result.zero_shot is not None:
        one = result.zero_shot
        guess = {"acc1": 1 / one.classes, "acc5": None, "mean_per_class_recall": 1 / one.classes}
        if one.acc5 is not None:
            guess["acc5"] = 5 / one.classes
        found.append(
            {
                "dataset": name,
                "task": "zeroshot_classification",
                "metrics": {key: getattr(one, key) for key in guess},
                "chance": guess,
                "majority": one.majority,
                "images": len(one.images),
                "classes": one.classes,
            }
        )
    if result.probe is not None:
        one = result.probe
        found.append(
            {
                "dataset": name,
                "task": "linear_probe",
                "metrics": {f"lp_{key}": getattr(one, key) for key in ("acc1", "mean_per_class_recall")},
                "chance": {f"lp_{key}": one.chance for key in ("acc1", "mean_per_class_recall")},
                "majority": one.majority,
                "C": one.C,
                "converged": one.converged,
            }
        )
    return found
