"""The command line: a new run or an old one's continuation, here or in the processes that it starts."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import traceback
from pathlib import Path
from typing import TextIO

from . import PROGRAM, checkpoint, config, heartbeat, launch, lock, tracker
from .config import Config, ConfigError
from .data.emoji import SetupError
from .data.record import DataError
from .data.workers import WorkerError
from .files import words, write_atomically
from .signals import STOPPED, StoppedError, end, name_of, say, stop
from .world import ElsewhereError, is_lost_contact, join_world

RUNS = Path("runs")
CONFIG_FILE = "config.yaml"
AUTO = "auto"
AUTO_PATIENCE = 15.0  # seconds for the ranks of a job whose launcher was killed; they end within 10
OTHER_COMMANDS = f"""other commands:
  {PROGRAM} plot RUN [RUN ...]  draw the curves of runs together
  {PROGRAM} evaluate RUN        evaluate a run from its newest checkpoint
  {PROGRAM} robustness          compare runs' accuracies under a shift with those of reference models
  {PROGRAM} grid STUDY.yaml     carry out the runs of a study
  {PROGRAM} compare STUDY       what its runs show, with intervals
  {PROGRAM} export RUN          write its towers in a form that another library loads
  {PROGRAM} data                prepare the emoji set
Each tells more with --help."""
USER_ERRORS = (ConfigError, checkpoint.CheckpointError, DataError, SetupError, lock.LockedError)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train CLIP-style towers with progressive self-distillation.",
        epilog=OTHER_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.name=value", help="options on top of the configuration"
    )
    parser.add_argument("--config", type=Path, help="a YAML file (default: that of the emoji run)")
    parser.add_argument(
        "--folder", type=Path, help="the new run's folder (default: runs/<configuration's name>-<number>)"
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a stopped run, with its configuration; `auto`: with that of --folder where it exists, else a "
        "new one",
    )
    parser.add_argument(
        "--stop-after", type=int, metavar="STEPS", help="stop, with a checkpoint, once so many are done"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of every process, launched or not; returns the exit status."""
    options = parse(arguments)
    try:
        settings, run = _asked_for(options)
        _check_tracker(settings.job.report)
        if launch.is_launched():
            return _run_rank(settings, run, options)
        count = launch.process_count(settings.job)
        held = _hold(settings, run, options)
        # The run's folder carries the configuration, so that every process reads one and the same.
        stop_after = [] if options.stop_after is None else ["--stop-after", str(options.stop_after)]
        return launch.launch(count, run, ["--resume", str(run), *stop_after], held)
    except (*USER_ERRORS, OSError) as error:
        _print_error(error)
        return launch.BAD_REQUEST


def _asked_for(options: argparse.Namespace) -> tuple[Config, Path]:
    """The configuration and folder that the command line asks for. Raises ConfigError where it asks for what is not
    there, or for what the run cannot go on with."""
    if options.stop_after is not None and options.stop_after < 1:
        raise ConfigError(f"--stop-after {options.stop_after}: allowed: 1 or more")
    if options.resume == AUTO:
        if options.folder is None:
            raise ConfigError("--resume auto: give --folder, the run's folder, which is made where it does not exist")
        settings, run = config.load(options.config, options.overrides), options.folder
        if (run / CONFIG_FILE).exists():
            _check_changes(run, config.load(run / CONFIG_FILE), settings)
        return settings, run
    if options.resume is not None:
        if options.config or options.folder:
            raise ConfigError("--resume takes the run's own configuration and folder; leave out --config and --folder")
        run = Path(options.resume)
        file = run / CONFIG_FILE
        if not file.exists():
            raise ConfigError(f"--resume {run}: no {CONFIG_FILE} there; give the folder of a run")
        settings = config.load(file, options.overrides)
        _check_changes(run, config.load(file), settings)
        return settings, run
    settings = config.load(options.config, options.overrides)
    if options.folder is not None:
        return settings, options.folder
    if launch.is_launched():
        raise ConfigError("started by torchrun or deepspeed: give --folder, so that all processes share one")
    stem = config.file_of(options.config, options.overrides).stem
    return settings, next(path for i in itertools.count(1) if not (path := RUNS / f"{stem}-{i}").exists())


def _check_tracker(library: str) -> None:
    """Raises ConfigError where the first rank, which reports, lacks what it is to report with."""
    if library != "none" and os.environ.get("RANK", "0") == "0" and not tracker.is_installed(library):
        raise ConfigError(
            f"job.report={library!r}, but {library} is not installed; pip install {library}, or leave job.report out"
        )


def _check_changes(run: Path, before: Config, after: Config) -> None:
    """Raises ConfigError where the run cannot go on with `after` instead of `before`. One that kept nothing yet can go
    on with anything."""
    if not checkpoint.has_any(run):
        return
    fixed = {name: pair for name, pair in config.changes(before, after).items() if name not in config.CHANGEABLE}
    if fixed:
        named = ", ".join(f"{name} (the run's: {then}, asked for: {now})" for name, (then, now) in fixed.items())
        raise ConfigError(
            f"the run {run} cannot go on with another {named}; allowed: {', '.join(config.CHANGEABLE)}. Leave it out, "
            "or start a new run with another --folder"
        )
    done = checkpoint.steps_done(run)
    if after.optimizer.steps < done:
        raise ConfigError(
            f"optimizer.steps={after.optimizer.steps}, but the run {run} has done {done} steps; allowed: that or more"
        )


def _hold(settings: Config, run: Path, options: argparse.Namespace) -> TextIO:
    """Make the run, or bring its configuration up to date. Returns its lock, which holds as long as it is open."""
    if options.resume is None or not (run / CONFIG_FILE).exists():
        _create(run, settings, exist_ok=options.resume == AUTO)
    held = lock.hold(run, AUTO_PATIENCE if options.resume == AUTO else 0.0)
    if config.load(run / CONFIG_FILE) != settings:
        write_atomically(run / CONFIG_FILE, settings.to_yaml().encode())
    return held


def _create(run: Path, settings: Config, exist_ok: bool) -> None:
    """Make a new run's folder with its configuration; never touches an old run's. `exist_ok`: a folder without a
    configuration will do, such as a job leaves that ended too early."""
    try:
        run.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError as error:
        raise ConfigError(f"the run {run} exists; go on with --resume {run}, or choose another --folder") from error
    except OSError as error:
        raise ConfigError(f"the run {run} cannot be made ({error.strerror}); choose another --folder") from error
    write_atomically(run / CONFIG_FILE, settings.to_yaml().encode())


def _run_rank(settings: Config, run: Path, options: argparse.Namespace) -> int:
    """Be one process of the job; returns its exit status."""
    rank = int(os.environ["RANK"])
    stop.act_at_once(lambda name: end(launch.stopped_early(run, name) if rank == 0 else None))
    watch = heartbeat.begin(run, rank, settings.job)
    stopped: str | None = None
    try:
        # Held until the process ends. What the command line changes is written before the others can go on.
        held = _hold(settings, run, options) if rank == 0 and not launch.is_launched_by_train() else None
        with join_world(settings.job) as world:
            # DeepSpeed takes seconds to import, which the launching process does without. It picks its device by this.
            os.environ.setdefault("DS_ACCELERATOR", world.device.type)
            from .run import Task, train

            try:
                stopped = train(Task(settings, run, options.stop_after), world, watch)
                watch.close()
            except Exception as error:
                launch.leave(_failed(error, run, watch))  # an orderly end would wait for ranks that may be gone
    except Exception as error:
        launch.leave(_failed(error, run, watch))
    if stopped is None:
        return 0
    if rank == 0:
        say(stopped)
    del held
    return STOPPED


def _failed(error: Exception, run: Path, watch: heartbeat.Heartbeat) -> int:
    """Say what ended this rank, unless another rank says it. Returns the exit status."""
    if isinstance(error, StoppedError):
        say(f"stopped by {error} in the evaluation at the end; all steps are done and kept; go on with --resume {run}")
        return STOPPED
    if isinstance(error, ElsewhereError):
        # The launcher ends this rank, and calls the other one the first to fail; or asks it to stop like the other.
        return STOPPED if stop.wait(launch.GRACE_SECONDS) else 1
    if isinstance(error, USER_ERRORS):
        _print_error(error)
        return launch.BAD_REQUEST
    if is_lost_contact(error):
        if watch.phase == heartbeat.SET_UP and stop.wait(launch.GRACE_SECONDS):  # another was asked a moment before
            if watch.rank == 0:
                say(launch.stopped_early(run, name_of(stop.request)))
            return STOPPED
        watch.fail(f"lost contact with another rank ({str(error).splitlines()[0]})")
        return 1
    if isinstance(
        error, (checkpoint.RunError, WorkerError, OSError)
    ):  # not faults of the code, which its lines would explain
        watch.fail(words(error))
        return 1
    traceback.print_exc()
    watch.fail(f"{type(error).__name__}: {error}")
    return 1


def _print_error(error: Exception) -> None:
    rank, said = os.environ.get("RANK", "0"), words(error)
    print(f"error: {said}" if rank == "0" else f"error: rank {rank}: {said}", file=sys.stderr, flush=True)
