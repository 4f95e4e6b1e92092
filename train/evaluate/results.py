"""What earlier evaluations found, read from their files: ours, and clip_benchmark's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import PROGRAM
from ..data import DataError
from .report import FIGURES

Results = dict[str, dict[str, float]]


def read_results(path: Path) -> Results:
    """The metrics of each set by name, of all tasks together, for example `{"vendor": {"acc1": 0.3}}`. What is null is
    left out.

    path  a run's folder, an evaluation.json, or a file that clip_benchmark wrote, which holds one set and task

    Raises DataError where there is no such file or it holds something else, OSError where it cannot be read.
    """
    file = path / FIGURES if path.is_dir() else path
    if not file.exists():
        raise DataError(
            f"{path}: no {file.name} there; give a run that was evaluated (`{PROGRAM} evaluate RUN`) or a JSON file of "
            "results"
        )
    try:
        content = json.loads(file.read_bytes())
        results: Results = {}
        for entry in content.get("results", [content]):
            metrics = {str(name): float(value) for name, value in entry["metrics"].items() if _is_figure(value)}
            results.setdefault(str(entry["dataset"]), {}).update(metrics)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file} holds no results, each with `dataset`, `task` and `metrics` ({type(error).__name__}: {error}); "
            f"`{PROGRAM} evaluate RUN` writes them anew"
        ) from error
    return results


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
