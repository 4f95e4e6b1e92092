"""Whether a run may go on from a checkpoint, and what is no longer as it was when that was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from . import checkpoint, fingerprint
from .config import Config
from .fingerprint import Fingerprint
from .options import ConfigError
from .world import World


def check(config: Config, stop_after: int | None, folder: Path, world: World, now: Fingerprint) -> checkpoint.State:
    """The state of the checkpoint in `folder`, to go on from as `config` says, to step `stop_after` where it is given.
    Raises ConfigError or CheckpointError where it does not fit."""
    state = checkpoint.read_state(folder)
    if stop_after is not None and stop_after < state.step:
        raise ConfigError(f"--stop-after {stop_after}, but {folder} has done {state.step} steps; allowed: that or more")
    compare(config, folder, now)
    if state.processes != world.size:
        print(
            f"{folder.name} was written by {state.processes} processes, and {world.size} go on: with the same batches, "
            "and sums in another order",
            flush=True,
        )
    return replace(state, processes=world.size, zero_stage=config.job.zero_stage)


def compare(config: Config, folder: Path, now: Fingerprint) -> None:
    """Name all that differs from when the checkpoint was written. Other data or teachers, and other options that are a
    part of what is trained, are refused; with other code or versions the run goes on, but need not repeat bit for
    bit."""
    fixed, changeable = checkpoint.other_options(checkpoint.read_config(folder), config)
    if fixed:
        raise ConfigError(
            f"the run cannot go on from {folder} with other options than it was trained with: {'; '.join(fixed)}; set "
            "them back in the run's config.yaml (name what `auto` was), or start a new run"
        )
    if changeable:
        print(f"going on with other options than {folder.name} was written with: {'; '.join(changeable)}", flush=True)
    then = checkpoint.read_fingerprint(folder)
    if then is None:
        print(f"{folder.name} holds no {checkpoint.FINGERPRINT}: whether data and code are as they were is not known")
        return
    data = fingerprint.other_data(then, now)
    if data is not None:
        raise checkpoint.CheckpointError(
            f"{folder} was trained on other data (fingerprint {data}); let data.source in the run's config.yaml name "
            "the data it was trained on, or start a new run"
        )
    teachers = fingerprint.other_teachers(then, now)
    if teachers is not None:
        raise checkpoint.CheckpointError(
            f"{folder} was taught by others than loss.teachers={list(config.loss.teachers)} name (SHA-256 of weights: "
            f"{teachers}); let them name the teachers it was trained with, or start a new run"
        )
    software = fingerprint.other_software(then, now)
    if software:
        print(f"{folder.name} was written by other software, and may not go on bit for bit: {'; '.join(software)}")
