"""Whole training jobs of two processes on the CPU with ranks killed, stopped, short of data or memory, and fed NaN.

Each start costs about ten seconds of imports, so that one job serves several checks.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers import parity
from helpers.data import tiny
from helpers.jobs import configuration, finish, start, wait_for

from train import checkpoint, heartbeat, launch, metrics, towers
from train.config import Config
from train.data import open_training_data

# --- Lost and stuck ranks


def test_a_stopped_rank_ends_the_job_within_the_time_out(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start("--config", str(configuration(tmp_path, data, steps=5000, timeout_seconds=8)), "--folder", str(run))
    place = wait_for(run, 1, lambda place: place.step >= 2)
    os.kill(place.pid, signal.SIGSTOP)
    status, said = finish(job)
    assert status != 0
    assert "error: rank 0, step " in said
    assert "rank 1: step " in said
    assert ", silent for " in said


def test_a_rank_killed_while_saving_is_named_and_the_checkpoint_before_stays(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start("--config", str(configuration(tmp_path, data)), "--folder", str(run), fault="stuck_saving")
    place = wait_for(run, 1, lambda place: place.phase == "saving" and place.step == 7)
    os.kill(place.pid, signal.SIGKILL)
    status, said = finish(job)
    assert status != 0
    assert "rank 1 was the first to fail (killed by SIGKILL" in said
    assert "rank 1: step 7, saving" in said
    assert checkpoint.find(run).name == "step-000004"


def test_the_killed_rank_is_named_before_those_that_noticed() -> None:
    """All seen by the launcher at one time."""
    assert launch._first_to_fail({0: 1, 1: -signal.SIGKILL, 2: 1}) == (1, -signal.SIGKILL)
    assert launch._first_to_fail({2: 1, 1: 3}) == (1, 3)


def test_a_rank_stopped_while_it_evaluates_ends_the_job(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = configuration(tmp_path, data, timeout_seconds=8)
    job = start("--config", str(file), "--folder", str(run), fault="stuck_evaluation")
    place = wait_for(run, 0, lambda place: place.phase == "evaluation")
    os.kill(place.pid, signal.SIGSTOP)
    wait_for(run, 1, lambda place: place.phase == heartbeat.FAILED)
    os.kill(place.pid, signal.SIGKILL)  # as the launcher does in the end; the 30 s until then are another test's
    status, said = finish(job)
    assert status != 0
    assert "error: rank 1, step 5, evaluation: " in said
    assert "rank 0: step 5, evaluation, silent for " in said


@pytest.mark.parametrize(
    ("fault", "status", "messages"),
    (
        ("bad_data_on_rank_1", 2, ("error: rank 1: spoilt for a test",)),
        (
            "no_memory_on_rank_1",
            1,
            (
                "error: rank 1, step 0, set-up: MemoryError: none left",
                "rank 1 was the first to fail (ended, exit status 1",
            ),
        ),
    ),
)
def test_what_one_rank_alone_finds_in_set_up_is_said_with_its_name(
    data: Path, tmp_path: Path, fault: str, status: int, messages: tuple[str, ...]
) -> None:
    job = start("--config", str(configuration(tmp_path, data)), "--folder", str(tmp_path / "run"), fault=fault)
    ended, said = finish(job)
    assert ended == status, said
    assert all(said.count(message) == 1 for message in messages), said
    assert "Timed out" not in said


# --- Non-finite losses, gradients


def test_a_nan_sample_of_one_rank_is_skipped_counted_and_named_until_too_many_are(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = configuration(tmp_path, data, micro_batches=3, max_skipped_share=0.002)
    status, said = finish(start("--config", str(file), "--folder", str(run), fault="nan_on_rank_1"))
    assert status == 1
    message = "the loss or gradient of step 4 is not finite, and the job ends: of the last 1000 steps 3 were skipped"
    assert said.count(message) == 1, said
    assert "Traceback" not in said
    rows = [row for row in metrics.read_rows(run / metrics.METRICS) if "loss" in row]
    assert [row["skipped"] for row in rows] == [0, 1, 2, 2, 3]
    assert [row["step"] for row in rows if row["loss"] is None] == [1, 2, 4]
    config = Config.from_dict(tiny(data))
    assert [row["alpha"] for row in rows] == [config.loss.alpha()(step) for step in range(5)]
    training = open_training_data(config)
    bundle = towers.build(config.model, training.captions)
    batches = list(training.batches(bundle, parity.ALONE, 0, 5))
    named = {row["step"]: tuple(row["keys"]) for row in metrics.read_rows(run / metrics.NONFINITE)}
    assert named == {step: batches[step].keys for step in (1, 2, 4)}
    state = checkpoint.read_state(checkpoint.find(run))
    assert (state.skipped, state.skipped_in_a_row, state.recent_skips) == (2, 0, (1, 2)), "a resumed run counts on"


def test_the_first_nan_stops_the_job_where_asked_to(data: Path, tmp_path: Path) -> None:
    file = configuration(tmp_path, data, on_nonfinite="stop")
    status, said = finish(start("--config", str(file), "--folder", str(tmp_path / "run"), fault="nan_on_rank_1"))
    assert status == 1
    assert "the loss or gradient of step 1 is not finite, and the job ends: job.on_nonfinite=stop" in said
    assert "Traceback" not in said
