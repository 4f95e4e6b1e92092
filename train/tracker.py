"""A run's rows in an experiment tracker, besides its own files: Weights & Biases or trackio, as job.report says."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .files import write_atomically

PROJECT = "softclip"
IDENTITY = "tracker_id"  # in the run's folder, so that a run that goes on is the same one there
Send = Callable[[int, dict[str, float]], object]
Begun = tuple[Send, Callable[[], object]]  # how to send the row of a step, and how to end


class Tracker:
    """A run in the tracker `library`. What goes wrong there ends nothing: it is said once, by `say`, and no more is
    sent.

    config  of the run, as plain mappings
    """

    def __init__(self, library: str, run: Path, config: dict[str, Any], say: Callable[[str], None]) -> None:
        self._library, self._say = library, say
        self._begun: Begun | None = None
        try:
            self._begun = _BEGIN[library](run, config)
        except Exception as error:  # of any kind: the library's own, the network's, the disk's
            self._give_up(error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        try:
            if self._begun is not None:
                self._begun[0](step, dict(values))
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._begun is not None:
                self._begun[1]()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._begun = None
        self._say(f"warning: {self._library} failed ({type(error).__name__}: {error}); the run goes on without it")


def is_installed(library: str) -> bool:
    """Without importing it. A folder of that name, such as wandb makes where it runs, is no library: it has no
    origin."""
    found = importlib.util.find_spec(library)
    return found is not None and found.origin is not None


def _begin_wandb(run: Path, config: dict[str, Any]) -> Begun:
    """Nothing leaves this machine unless WANDB_MODE=online says so; `wandb sync` sends a run later."""
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    begun = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        id=_identity(run),
        dir=str(run),
        config=config,
        mode=mode,
        resume="allow" if mode == "online" else None,  # without its server there is nothing to go on from
        settings=wandb.Settings(console="off"),  # it would stand between the progress bar and the terminal
    )
    begun.define_metric("*", step_metric="step")  # its own count cannot go back to a checkpoint
    return lambda step, values: begun.log({"step": step, **values}), begun.finish


def _begin_trackio(run: Path, config: dict[str, Any]) -> Begun:
    """Into its own data base on this machine."""
    import trackio

    begun = trackio.init(project=PROJECT, name=f"{run.name}-{_identity(run)}", config=config, resume="allow")
    return lambda step, values: begun.log(values, step=step), begun.finish


def _identity(run: Path) -> str:
    file = run / IDENTITY
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex[:8].encode())
    return file.read_text(encoding="utf-8")


_BEGIN: dict[str, Callable[[Path, dict[str, Any]], Begun]] = {"wandb": _begin_wandb, "trackio": _begin_trackio}
