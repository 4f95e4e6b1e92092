"""`python -m train evaluate RUN`: evaluate a finished or stopped run from its newest good checkpoint, or, without a
RUN, towers with their library's weights."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from .. import PROGRAM, checkpoint, config, launch, towers
from ..config import Config, ConfigError, JobOptions
from ..data import DataError, SetupError
from ..files import words
from ..fingerprint import SHORT
from ..world import ElsewhereError, World, join_world, on_each, on_first
from . import evaluate_checkpoint, evaluate_towers, report
from .sets import Evaluation, read_evaluation

EPILOG = f"""examples:
  {PROGRAM} evaluate runs/a
  {PROGRAM} evaluate runs/a data.evaluate.photos=my/photos --folder photos/
  {PROGRAM} evaluate model.towers=open_clip:ViT-B-32:weights.safetensors data.evaluate.photos=my/photos"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status, but in a rank, which ends here."""
    options = _parse(arguments)
    if launch.is_launched():
        launch.leave(_run(options))
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        if options.processes > 1 and not launch.is_launched():
            return _launch(options)
        with _world(options.device) as world:
            _evaluate(options, world)
    except ElsewhereError:
        return 1  # that rank says it
    except (checkpoint.CheckpointError, ConfigError, DataError, SetupError, OSError) as error:
        print(f"error: {words(error)}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} evaluate",
        description="Evaluate a finished or stopped run from its newest good checkpoint, or, without a run, towers "
        "with the weights of their library.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="the run's folder, for example runs/emoji-1")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.name=value",
        help="options on top of the configuration; those of section data with a RUN",
    )
    parser.add_argument("--config", type=Path, help="a YAML file, without a RUN")
    parser.add_argument(
        "--folder", type=Path, help="where evaluation.md and evaluation.json go (default: the RUN's, else nowhere)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the towers run (default: %(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="how many share the work; on GPUs, one each (default: %(default)s)"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: allowed: 1 or more")
    if options.run is not None and "=" in options.run and not Path(options.run).is_dir():
        options.run, options.overrides = None, [options.run, *options.overrides]
    return options


def _launch(options: argparse.Namespace) -> int:
    """Start the ranks; returns the exit status of the first that fails."""
    count = options.processes
    if launch.on_gpu(JobOptions(device=options.device)) and count > torch.cuda.device_count():
        raise ConfigError(
            f"--processes {count}; allowed: at most {torch.cuda.device_count()}, the GPUs here, or --device cpu"
        )
    store = dist.TCPStore(launch.LOOPBACK, 0, is_master=True, wait_for_workers=False)  # the ranks meet there
    try:
        processes.spawn(_rank, (options, store.port), count)
    except processes.ProcessExitedException as error:
        if error.signal_name is not None:
            print(f"error: rank {error.error_index} was killed by {error.signal_name}", file=sys.stderr)
        return max(error.exit_code, 1)
    return 0


def _rank(rank: int, options: argparse.Namespace, port: int) -> None:
    os.environ.update(launch.environment_of(rank, options.processes, port, os.getppid()))
    launch.leave(_run(options))


@contextmanager
def _world(device: str) -> Iterator[World]:
    job = JobOptions(device=device)
    if launch.is_launched():
        with join_world(job) as world:
            yield world
    else:
        yield World(0, 1, torch.device("cuda" if launch.on_gpu(job) else "cpu"), None)


def _evaluate(options: argparse.Namespace, world: World) -> None:
    if options.run is None:
        settings, folder = on_each(world, lambda: _without_run(options)), None
    else:
        settings, folder = on_first(world, lambda: _of_run(options))
    evaluation = read_evaluation(settings.data, world)
    if folder is None:
        bundle = on_each(world, lambda: _library_towers(settings))
        for note in bundle.notes if world.rank == 0 else ():
            print(f"{settings.model.towers}: {note}", file=sys.stderr)
        bundle.module.to(world.device).eval()
        results = evaluate_towers(bundle, evaluation, settings.data, world)
    else:
        if world.rank == 0:
            _warn_of_other_data(folder, evaluation)
        results = evaluate_checkpoint(folder, evaluation, settings.data, world)

    def tell() -> None:
        print(f"{folder or settings.model.towers}\n\n{report.text(results, evaluation)}", flush=True)
        to = options.folder or (None if options.run is None else Path(options.run))
        if to is not None:  # last, for the disk may be full
            to.mkdir(parents=True, exist_ok=True)
            name = None if folder is None else folder.name
            report.write(to, settings.model.towers, name, results, evaluation)

    on_first(world, tell)


def _of_run(options: argparse.Namespace) -> tuple[Config, Path]:
    """The run's configuration, and the folder of its checkpoint."""
    if options.config is not None:
        raise ConfigError("--config goes without a RUN, which has a configuration of its own; leave one of them out")
    for override in options.overrides:
        if not override.startswith("data."):
            raise ConfigError(f"{override!r} with a RUN; allowed: options of section data, for the model is the run's")
    folder = checkpoint.find(Path(options.run), warn=lambda text: print(text, file=sys.stderr))
    settings = config.changed(checkpoint.read_config(folder), options.overrides, folder / checkpoint.CONFIG)
    if not settings.data.evaluate:
        raise ConfigError(f"{options.run} has no data.evaluate; add data.evaluate.NAME=SOURCE")
    return settings, folder


def _without_run(options: argparse.Namespace) -> Config:
    settings = config.load(options.config or config.EMPTY_FILE, options.overrides)
    if settings.model.towers == "small":
        raise ConfigError("model.towers='small' has no weights but a run's; give a RUN, or model.towers of a library")
    if not settings.data.evaluate:
        raise ConfigError("data.evaluate is empty; add data.evaluate.NAME=SOURCE")
    return settings


def _library_towers(settings: Config) -> towers.Bundle:
    torch.manual_seed(settings.job.seed)  # what has no weights of its own is at least the same everywhere
    return towers.build(settings.model, tuple)


def _warn_of_other_data(folder: Path, evaluation: Evaluation) -> None:
    """Figures are comparable only where the data are the same."""
    then = checkpoint.read_fingerprint(folder)
    for name, now in evaluation.fingerprints().items():
        before = "" if then is None else then.evaluation.get(name, "")
        if before and before != now:
            said = f"{name} holds other data than when {folder.name} was written"
            print(f"warning: {said} (fingerprint {before[:SHORT]} then, {now[:SHORT]} now)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
