"""What is kept of a run that is done: a line of JSON in the study's folder, which says all that a comparison needs."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..checkpoint import CheckpointError
from ..data import DataError
from ..evaluate.report import FIGURES
from ..files import write_atomically
from ..metrics import METRICS, read_rows
from ..threads import cpu_count
from .jobs import Ended
from .plan import Run

STUDY_FILE, LINES = "study.yaml", "runs.jsonl"
Lines = dict[str, dict[str, Any]]


def folder_in(study: Path, name: str) -> Path:
    """Of the run of that name."""
    return study / "runs" / name


def read_lines(study: Path) -> Lines:
    """Of each finished run, by its name. Raises DataError where the file holds something else."""
    path = study / LINES
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        return {line["run"]: line for line in lines}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path} holds something else than a line for each finished run ({type(error).__name__}: {error}); put "
            "back what the grid wrote, or remove the lines that are wrong, whose runs are then evaluated once more"
        ) from error


def write_lines(study: Path, lines: Lines) -> None:
    """All of them anew, so that a crash leaves no part of one."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
    write_atomically(study / LINES, text.encode())


def describe(study: Path, run: Run, commit: str | None, first_step: int, ended: Ended) -> dict[str, Any]:
    """The line of a run that has just ended well.

    commit      of the code, as commit_of says it
    first_step  from which it was carried out last; the seconds are those since then
    """
    folder = folder_in(study, run.name)
    kept = checkpoint.find(folder)
    fingerprint = checkpoint.read_fingerprint(kept)
    trained = [row for row in read_rows(folder / METRICS) if "loss" in row]
    return {
        "run": run.name,
        "condition": run.condition,
        "method": run.method,
        "seed": run.seed,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit,
        "fingerprint": None if fingerprint is None else asdict(fingerprint),
        "configuration": run.config.to_dict(),
        "results": results_of(folder),
        "evaluation_commit": commit,
        "training": trained[-1] if trained else None,
        "first_step": first_step,
        "wall_seconds": round(ended.wall_seconds, 1),
        "processor_seconds": round(ended.processor_seconds, 1),
        "machine": {"host": socket.gethostname(), "cores": cpu_count(), "platform": platform.platform()},
    }


def results_of(folder: Path) -> Any:
    """What the evaluation of a run found; None where it is evaluated on nothing."""
    path = folder / FIGURES
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def steps_done(folder: Path) -> int:
    """By a run so far; 0 where it has kept none."""
    try:
        return checkpoint.steps_done(folder) if checkpoint.has_any(folder) else 0
    except CheckpointError:
        return 0


def commit_of(file: Path) -> str | None:
    """Of the git repository that a file is part of, with `-dirty` where something there differs from it; None where it
    is part of none, as an installed one, which may lie in the folder of some repository all the same."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # others may work in the repository

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(file.parent), *arguments]
        try:
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    tracked = git("ls-files", "--error-unmatch", file.name) is not None
    return git("describe", "--always", "--dirty", "--abbrev=12") if tracked else None
