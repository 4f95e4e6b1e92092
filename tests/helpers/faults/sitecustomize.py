"""Faults in the ranks of a whole job. Python imports a module of this name at every start, where it finds one. The jobs
of helpers.jobs.start(fault=...) find this one, and TRAIN_FAULT names what to break; the launching process stays whole.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

RANK = os.environ.get("RANK")
STUCK_SECONDS = 90.0
SLOW_SECONDS = 1.2


def bad_data_on_rank_1() -> None:
    from train import data

    real = data.open_training_data

    def open_training_data(*arguments: Any) -> Any:
        if RANK == "1":
            raise data.DataError("spoilt for a test")
        return real(*arguments)

    data.open_training_data = open_training_data


def no_memory_on_rank_1() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from train import engine

    def make_engine(*_: Any) -> Any:
        raise MemoryError("none left for a test")

    if RANK == "1":
        engine.make_engine = make_engine


def _with_each_batch(act: Callable[[int, Any], None]) -> None:
    """Have `act` called with the number and this rank's share of every step's batch, before it is trained on."""
    from train.data import TrainingData

    real = TrainingData.batches

    def batches(self: Any, bundle: Any, world: Any, first: int, *others: Any, **more: Any) -> Any:
        for step, batch in enumerate(real(self, bundle, world, first, *others, **more), first):
            act(step, batch)
            yield batch

    TrainingData.batches = batches  # type: ignore[method-assign]


def nan_on_rank_1() -> None:
    """One picture of rank 1's share of the steps 1, 2 and 4."""

    def spoil(step: int, batch: Any) -> None:
        if RANK == "1" and step in (1, 2, 4):
            batch.images[0, 0, 0, 0] = float("nan")

    _with_each_batch(spoil)


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
    from train.data import TrainingData

    real = TrainingData.batches

    def batches(self: Any, bundle: Any, world: Any, *others: Any, **more: Any) -> Any:
        return real(self, bundle, replace(world, rank=0), *others, **more)

    TrainingData.batches = batches  # type: ignore[method-assign]


def forgotten_moments() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from train import engine_state

    engine_state._load_state = lambda *_: None


def leaks() -> None:
    """A handle and 20 kB a step, and a thread every tenth."""
    kept = []

    def leak(step: int, batch: Any) -> None:
        kept.append((os.open(os.devnull, os.O_RDONLY), b"x" * 20_000))
        if step % 10 == 0:
            threading.Thread(target=threading.Event().wait, daemon=True).start()

    _with_each_batch(leak)


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

    if RANK == "0":
        evaluate.retrieve = lambda *_: time.sleep(STUCK_SECONDS)  # type: ignore[assignment, misc]


def stuck_set_up() -> None:
    """Rank 1 stands still while it reads the data."""
    from train import data

    real = data.open_training_data

    def open_training_data(*arguments: Any) -> Any:
        if RANK == "1":
            time.sleep(STUCK_SECONDS)
        return real(*arguments)

    data.open_training_data = open_training_data


def slow_evaluation_and_saving() -> None:
    """Each of an evaluation's many chunks and each of a checkpoint's files takes its time."""
    from train import checkpoint
    from train.evaluate import embed

    tick, sync_file = embed.heartbeat.tick, checkpoint.sync_file

    def slow_tick() -> None:
        time.sleep(SLOW_SECONDS)
        tick()

    def slow_sync_file(path: Any) -> None:
        time.sleep(SLOW_SECONDS)
        sync_file(path)

    embed.CHUNK = 4
    embed.heartbeat = SimpleNamespace(tick=slow_tick)  # type: ignore[assignment]
    checkpoint.sync_file = slow_sync_file


def rank_1_killed_once() -> None:
    """At step 5 of the first of several starts under torchrun."""

    def kill(step: int, batch: Any) -> None:
        if RANK == "1" and step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    _with_each_batch(kill)


def none_with_libraries() -> None:
    """Nothing breaks, and torchvision can be imported."""
    import helpers.libraries  # noqa: F401


if RANK is not None:
    globals()[os.environ["TRAIN_FAULT"]]()
