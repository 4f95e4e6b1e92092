"""Faults in the ranks of a whole job. Python imports a module of this name at every start, where it finds one; the jobs
of train_jobs.start(fault=...) find this one, and TRAIN_FAULT names what to break. The launching process stays whole."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

RANK = os.environ.get("RANK")
STUCK_SECONDS = 90.0


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
    from train.samples import Sampler

    real = Sampler.share

    def share(self: Sampler, step: int, rank: int, *others: Any) -> Any:
        batch = real(self, step, rank, *others)
        if rank == 1 and step in (1, 2, 4):
            batch.images[0, 0, 0, 0] = float("nan")
        return batch

    Sampler.share = share  # type: ignore[method-assign]


def one_share_for_all() -> None:
    from train.samples import Sampler

    real = Sampler.share
    Sampler.share = lambda self, step, rank, *others: real(self, step, 0, *others)  # type: ignore[method-assign]


def forgotten_moments() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed import DeepSpeedEngine

    real = DeepSpeedEngine.load_checkpoint
    DeepSpeedEngine.load_checkpoint = lambda *given, **named: real(*given, **named, load_optimizer_states=False)


def leaks() -> None:
    """A handle and 20 kB a step, and a thread every tenth."""
    from train.samples import Sampler

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


if RANK is not None:
    globals()[os.environ["TRAIN_FAULT"]]()
