"""Faults in the ranks of a whole job. Python imports a module of this name at every start, where it finds one. The jobs
of helpers.jobs.start(fault=...) find this one, and TRAIN_FAULT names what to break; the launching process stays whole.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

RANK = os.environ.get("RANK")
STUCK_SECONDS = 90.0
SLOW_SECONDS = 1.2


def bad_data_on_rank_1() -> None:
    from train import data

    real = data.load_pairs

    def load_pairs(*arguments: Any, **options: Any) -> Any:
        if RANK == "1":
            raise data.DataError("spoilt for a test")
        return real(*arguments, **options)

    data.load_pairs = load_pairs


def no_memory_on_rank_1() -> None:
    from train.model import Clip

    def parameter_groups(self: Clip, weight_decay: float) -> Any:
        raise MemoryError("none left for a test")

    if RANK == "1":
        Clip.parameter_groups = parameter_groups  # type: ignore[method-assign]


def nan_on_rank_1() -> None:
    """One picture of rank 1's share of the steps 1, 2 and 4."""
    from train.data import Sampler

    real = Sampler.share

    def share(self: Sampler, step: int, rank: int, *others: Any) -> Any:
        batch = real(self, step, rank, *others)
        if rank == 1 and step in (1, 2, 4):
            batch.images[0, 0, 0, 0] = float("nan")
        return batch

    Sampler.share = share  # type: ignore[method-assign]


def nan_moment_on_rank_1() -> None:
    """In rank 1's part of the optimizer's state, after step 7: before the checkpoint of 8 steps."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from train import step

    real = step.train_step

    def train_step(engine: Any, batch: Any, number: int, *others: Any) -> Any:
        result = real(engine, batch, number, *others)
        if RANK == "1" and number == 7:
            next(iter(engine.optimizer.optimizer.state.values()))["exp_avg"][0] = float("nan")
        return result

    step.train_step = train_step


def full_disk() -> None:
    """For the logs from step 5 on, and for rank 1's file of the checkpoint of 8 steps."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from train import engine_files, metrics

    row, write = metrics.Log.row, engine_files.write

    def full_row(self: metrics.Log, step: int, *others: Any) -> None:
        if step == 5:
            os.dup2(os.open("/dev/full", os.O_WRONLY), self._files[metrics.METRICS]._file.fileno())  # type: ignore[union-attr]
            for path in list((self._run / metrics.EVENTS).iterdir()):
                full = path.with_name("full")
                full.symlink_to("/dev/full")
                full.replace(path)  # at once: TensorBoard's thread would make the file anew
        row(self, step, *others)

    def full_write(path: Any, content: Any) -> None:
        if RANK == "1" and "step-000008" in str(path):
            path.symlink_to("/dev/full")
        write(path, content)

    metrics.Log.row = full_row  # type: ignore[method-assign]
    engine_files.write = full_write


def one_share_for_all() -> None:
    from train.data import Sampler

    real = Sampler.share
    Sampler.share = lambda self, step, rank, *others: real(self, step, 0, *others)  # type: ignore[method-assign]


def forgotten_moments() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed import DeepSpeedEngine

    real = DeepSpeedEngine.load_checkpoint
    DeepSpeedEngine.load_checkpoint = lambda *given, **named: real(*given, **named, load_optimizer_states=False)


def leaks() -> None:
    """A handle and 20 kB a step, and a thread every tenth."""
    from train.data import Sampler

    real, kept = Sampler.share, []

    def share(self: Sampler, step: int, *others: Any) -> Any:
        kept.append((os.open(os.devnull, os.O_RDONLY), b"x" * 20_000))
        if step % 10 == 0:
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        return real(self, step, *others)

    Sampler.share = share  # type: ignore[method-assign]


def stuck_saving() -> None:
    """Rank 0 stands still before it commits step 8."""
    from train import checkpoint

    real = checkpoint.commit

    def commit(run: Any, scratch: Any, step: int, *others: Any) -> Any:
        if step == 8:
            time.sleep(STUCK_SECONDS)
        return real(run, scratch, step, *others)

    checkpoint.commit = commit


def stuck_evaluation() -> None:
    """Rank 0 stands still in the evaluation on the way."""
    from train import evaluate

    evaluate.retrieve = lambda *_: time.sleep(STUCK_SECONDS)  # type: ignore[assignment, misc]


def stuck_set_up() -> None:
    """Rank 1 stands still while it reads the data."""
    from train import data

    real = data.load_pairs

    def load_pairs(*arguments: Any, **options: Any) -> Any:
        if RANK == "1":
            time.sleep(STUCK_SECONDS)
        return real(*arguments, **options)

    data.load_pairs = load_pairs


def slow_evaluation_and_saving() -> None:
    """Each of an evaluation's many chunks and each of a checkpoint's files takes its time."""
    from train import checkpoint
    from train.evaluate import embed

    composite, sync_file = embed.composite, checkpoint.sync_file

    def slow_composite(*arguments: Any) -> Any:
        time.sleep(SLOW_SECONDS)
        return composite(*arguments)

    def slow_sync_file(path: Any) -> None:
        time.sleep(SLOW_SECONDS)
        sync_file(path)

    embed.CHUNK = 8
    embed.composite = slow_composite
    checkpoint.sync_file = slow_sync_file


def rank_1_killed_once() -> None:
    """At step 5 of the first of several starts under torchrun."""
    from train.data import Sampler

    real = Sampler.share

    def share(self: Sampler, step: int, rank: int, *others: Any) -> Any:
        if rank == 1 and step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, step, rank, *others)

    Sampler.share = share  # type: ignore[method-assign]


if RANK is not None:
    globals()[os.environ["TRAIN_FAULT"]]()
