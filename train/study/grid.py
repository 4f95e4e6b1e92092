"""`python -m train grid STUDY.yaml --folder FOLDER`: carry out the runs of a study, or go on with them.

The folder holds study.yaml, a line of JSON for each finished run (runs.jsonl), and below runs/ each run's folder beside
its configuration (.yaml) and what it said (.log).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import PROGRAM, checkpoint, config, launch, lock, threads
from ..cli import CONFIG_FILE, USER_ERRORS
from ..config import Config, ConfigError
from ..data import open_source
from ..data.stream import SCHEME
from ..files import words, write_atomically
from ..signals import LAUNCHER, STOPPED, name_of, stop
from .finished import (
    STUDY_FILE,
    commit_of,
    describe,
    folder_in,
    read_lines,
    results_of,
    steps_done,
    write_lines,
)
from .jobs import Ended, Job, carry_out
from .plan import Run, read_study

PATIENCE = 15.0  # seconds for a grid that was killed a moment ago
FAILED = 1  # exit status where some run failed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} grid",
        description="Carry out the runs of a study, or go on with them: those that are finished are left as they are, "
        "the others go on from their checkpoints.",
    )
    parser.add_argument("file", type=Path, metavar="STUDY.yaml", help="the study: see train/study/plan.py")
    parser.add_argument("--folder", type=Path, required=True, help="the study's folder")
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="runs at a time (default: as many as there are cores for them; where they take a GPU, 1)",
    )
    parser.add_argument(
        "--niceness", type=int, default=0, metavar="N", help="0 to 19: how far the runs stand back behind other work"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs and how far each one is, and do nothing")
    parser.add_argument(
        "--evaluate-again", action="store_true", help="evaluate the finished runs anew, from their checkpoints"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(arguments)
    stop.listen()
    try:
        if options.parallel is not None and options.parallel < 1:
            raise ConfigError(f"--parallel {options.parallel}; allowed: 1 or more")
        if not 0 <= options.niceness <= 19:
            raise ConfigError(f"--niceness {options.niceness}; allowed: 0 to 19")
        study, folder = read_study(options.file), options.folder
        _check_changes(folder, study.runs)
        if options.dry_run:
            _list(folder, study.runs)
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        with lock.hold(folder, PATIENCE, "study"):
            write_atomically(folder / STUDY_FILE, study.to_yaml().encode())
            os.nice(options.niceness)
            _prepare(study.runs)
            stop.act_at_once(None)
            parallel = options.parallel or _fitting(study.runs)
            carry = _evaluate_again if options.evaluate_again else _train
            failed = carry(folder, study.runs, parallel)
    except (*USER_ERRORS, OSError) as error:
        print(f"error: {words(error)}", file=sys.stderr)
        return launch.BAD_REQUEST
    if stop.request:
        done = len(read_lines(folder).keys() & {run.name for run in study.runs})
        print(
            f"stopped by {name_of(stop.request)}: {done} of {len(study.runs)} runs are finished, and those that had "
            "begun have their checkpoints; go on with the same command",
            file=sys.stderr,
        )
        return STOPPED
    for name in failed:
        print(f"error: {name} failed; what it said is in {folder / 'runs' / name}.log", file=sys.stderr)
    return FAILED if failed else 0


def _check_changes(folder: Path, runs: Sequence[Run]) -> None:
    """Raises ConfigError where the study's file asks for another configuration than a run has that is finished, or has
    a checkpoint."""
    lines = read_lines(folder)
    for run in runs:
        file = folder_in(folder, run.name) / CONFIG_FILE
        try:
            if run.name in lines:
                before = Config.from_dict(lines[run.name]["configuration"])
            elif checkpoint.has_any(file.parent):
                before = config.load(file)
            else:
                continue
        except ConfigError as error:
            raise ConfigError(f"the run {run.name} of {folder} cannot go on here: {error}") from error
        changed = config.changes(before, run.config)
        if changed:
            named = ", ".join(f"{name} (then {then}, now {now})" for name, (then, now) in changed.items())
            raise ConfigError(
                f"the run {run.name} of {folder} has another {named}; allowed: the same. Leave it as it was, give the "
                "new method a name of its own, or choose another --folder"
            )


def _list(folder: Path, runs: Sequence[Run]) -> None:
    lines = read_lines(folder)
    for run in runs:
        steps, done = run.config.optimizer.steps, steps_done(folder_in(folder, run.name))
        state = "finished" if run.name in lines else f"{done} of {steps} steps" if done else "not begun"
        print(f"{run.name}: {state}")
    print(f"{sum(run.name in lines for run in runs)} of {len(runs)} runs are finished")


def _prepare(runs: Sequence[Run]) -> None:
    """Open every source once, before the runs do it side by side: what is fetched, drawn or indexed is there then, and
    what is wrong is said at once."""
    seen = set()
    for run in runs:
        data = run.config.data
        form = (data.seed, data.image_key, data.text_key, data.image_column, data.caption_column, data.index)
        probe = [] if data.probe is None else [data.probe]
        for spec in (data.source, *data.evaluate.values(), *probe):
            if not spec.startswith(SCHEME) and (spec, form) not in seen:
                seen.add((spec, form))
                open_source(spec, data)


def _fitting(runs: Sequence[Run]) -> int:
    """How many runs at a time this machine has room for."""
    if any(launch.on_gpu(run.config.job) for run in runs):
        return 1
    most = max(launch.process_count(run.config.job) * (run.config.job.threads or 1) for run in runs)
    return max(threads.cpu_count() // most, 1)


def _train(folder: Path, runs: Sequence[Run], parallel: int) -> list[str]:
    """Carry out the runs that are not finished; returns the names of those that failed."""
    lines, commit = read_lines(folder), commit_of(Path(__file__))
    left = {run.name: run for run in runs if run.name not in lines}
    first_steps = {name: steps_done(folder_in(folder, run.name)) for name, run in left.items()}
    jobs = []
    for name, run in left.items():
        place = folder_in(folder, run.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.with_name(f"{place.name}.yaml")
        write_atomically(file, run.config.to_yaml().encode())
        asked = ["--config", str(file), "--folder", str(place), "--resume", "auto"]
        jobs.append(_job(name, place, *asked))

    def began(job: Job) -> None:
        since = f" from step {first_steps[job.name]}" if first_steps[job.name] else ""
        print(f"{job.name}: begins{since}", flush=True)

    def keep(job: Job, how: Ended) -> str:
        lines[job.name] = describe(folder, left[job.name], commit, first_steps[job.name], how)
        write_lines(folder, lines)
        done = sum(run.name in lines for run in runs)
        return f"finished in {how.wall_seconds:.0f} s; {done} of {len(runs)}"

    return _carry_out(jobs, parallel, began, keep, "failed")


def _evaluate_again(folder: Path, runs: Sequence[Run], parallel: int) -> list[str]:
    """Evaluate the finished runs anew and put what that finds into their lines; returns the names of those that
    failed."""
    lines, commit = read_lines(folder), commit_of(Path(__file__))
    places = {run.name: folder_in(folder, run.name) for run in runs if run.name in lines}
    jobs = [_job(name, place, "evaluate", str(place)) for name, place in places.items()]

    def keep(job: Job, how: Ended) -> str:
        lines[job.name] |= {"results": results_of(places[job.name]), "evaluation_commit": commit}
        write_lines(folder, lines)
        return "evaluated"

    return _carry_out(jobs, parallel, lambda job: None, keep, "could not be evaluated")


def _job(name: str, place: Path, *arguments: str) -> Job:
    """The trainer with these arguments, for the run in folder `place`."""
    return Job(name, _command(*arguments), place.with_name(f"{place.name}.log"))


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", str(__package__).partition(".")[0], *arguments]


def _carry_out(
    jobs: Sequence[Job], parallel: int, began: Callable[[Job], None], keep: Callable[[Job, Ended], str], failed: str
) -> list[str]:
    """Carry out the jobs; returns the names of those that failed, of which `failed` is said. `keep` keeps what one that
    ended well has left, and returns what is said of it."""
    names = []

    def ended(job: Job, how: Ended) -> None:
        if how.status == 0:
            print(f"{job.name}: {keep(job, how)}", flush=True)
        elif not stop.request:
            names.append(job.name)
            print(f"{job.name}: {failed} (exit status {how.status}); see {job.log}", flush=True)

    carry_out(jobs, parallel, _environment(), began, ended)
    return names


def _environment() -> dict[str, str]:
    """Of a run: it ends, with a checkpoint, where this process does; and it has one thread, where its configuration
    leaves their number open."""
    return {threads.VARIABLE: "1", **os.environ, LAUNCHER: str(os.getpid())}


if __name__ == "__main__":
    sys.exit(main())
