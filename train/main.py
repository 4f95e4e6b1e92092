"""The command line: a new run or an old one's continuation, here or in the processes that it starts."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
import traceback
from pathlib import Path

from train import checkpoint, config, launch
from train.config import Config, ConfigError
from train.data import DataError, SetupError
from train.files import explain, write_atomically
from train.progress import Progress

RUNS = Path("runs")
CONFIG_FILE = "config.yaml"
USER_ERRORS = (ConfigError, checkpoint.CheckpointError, DataError, SetupError)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train", description="Train a small CLIP with progressive self-distillation on emoji."
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.name=value", help="options on top of the configuration"
    )
    parser.add_argument("--config", type=Path, help="a YAML file (default: train/configs/emoji.yaml)")
    parser.add_argument(
        "--folder", type=Path, help="the new run's folder (default: runs/<configuration's name>-<number>)"
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run, with its configuration")
    parser.add_argument(
        "--stop-after", type=int, metavar="STEPS", help="stop, with a checkpoint, once so many are done"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of every process, launched or not; returns the exit status."""
    options = parse(arguments)
    try:
        settings, run = _prepared(options)
        if launch.is_launched():
            return _ranked(settings, run, options)
        if options.resume is None:
            _create(run, settings)
        count = launch.process_count(settings.job)
        # The run's folder carries the configuration, so that every process reads one and the same.
        stop = [] if options.stop_after is None else ["--stop-after", str(options.stop_after)]
        return launch.launch(count, run, ["--resume", str(run), *stop])
    except (*USER_ERRORS, OSError) as error:
        _say(error)
        return launch.BAD_REQUEST


def _prepared(options: argparse.Namespace) -> tuple[Config, Path]:
    """The configuration and folder that the command line asks for."""
    if options.stop_after is not None and options.stop_after < 1:
        raise ConfigError(f"--stop-after {options.stop_after}: allowed: 1 or more")
    if options.resume is not None:
        if options.overrides or options.config or options.folder:
            raise ConfigError("--resume takes the run's own configuration; leave out --config, --folder and overrides")
        file = options.resume / CONFIG_FILE
        if not file.exists():
            raise ConfigError(f"--resume {options.resume}: no {CONFIG_FILE} there; give the folder of a run")
        return config.load(file), options.resume
    settings = config.load(options.config, options.overrides)
    if options.folder is not None:
        return settings, options.folder
    if launch.is_launched():
        raise ConfigError("started by torchrun or deepspeed: give --folder, so that all processes share one")
    stem = (options.config or config.DEFAULT_FILE).stem
    return settings, next(path for i in itertools.count(1) if not (path := RUNS / f"{stem}-{i}").exists())


def _create(run: Path, settings: Config) -> None:
    """A new run's folder with its configuration; never an old one's."""
    try:
        run.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError(f"the run {run} exists; go on with --resume {run}, or choose another --folder") from error
    write_atomically(run / CONFIG_FILE, settings.to_yaml().encode())


def _ranked(settings: Config, run: Path, options: argparse.Namespace) -> int:
    """One process of the job."""
    with launch.world(settings.job) as world:
        # DeepSpeed takes seconds to import, which the launching process does without. It picks its device by this name.
        os.environ.setdefault("DS_ACCELERATOR", world.device.type)
        from train.job import train

        progress: Progress | None = None
        try:
            if options.resume is None:
                launch.on_first(world, lambda: _create(run, settings))
            progress = Progress(run, world.rank, settings.job.timeout_seconds)
            train(settings, run, world, progress, options.stop_after)
            progress.close()
        except Exception as error:
            launch.leave(_failed(error, progress))  # an orderly end would wait for ranks that may be gone
    return 0


def _failed(error: Exception, progress: Progress | None) -> int:
    """Say what ended this rank, unless another rank says it; returns the exit status."""
    if isinstance(error, launch.ElsewhereError):
        # The launcher ends this rank, and calls the other one the first to fail.
        time.sleep(launch.GRACE_SECONDS)
        return 1
    if isinstance(error, USER_ERRORS):
        _say(error)
        return launch.BAD_REQUEST
    known = isinstance(error, (checkpoint.RunError, OSError))  # not faults of the code, which its lines would explain
    if not known:
        traceback.print_exc()
    if progress is not None:
        progress.fail(_words(error) if known else f"{type(error).__name__}: {error}")
    elif known:
        _say(error)
    return 1


def _say(error: Exception) -> None:
    rank, words = os.environ.get("RANK", "0"), _words(error)
    print(f"error: {words}" if rank == "0" else f"error: rank {rank}: {words}", file=sys.stderr, flush=True)


def _words(error: Exception) -> str:
    return explain(error) if isinstance(error, OSError) else str(error)
