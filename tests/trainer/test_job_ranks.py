"""Whole training jobs compared: on 1, 2 and 4 processes, and killed and resumed, at every ZeRO stage, in two passes and
with any number of the data's workers.

Each start costs about ten seconds of imports a process, so that one job serves several checks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import parity
from helpers.data import tiny
from helpers.jobs import configuration, finish, start, training_rows, wait_for
from safetensors.torch import load_file
from torch import Tensor

from softclip_kernels import Hard
from train import checkpoint, towers
from train.config import Config
from train.targets import target_at

STEPS, RESUMED = 40, 20  # RESUMED: at least so many come after a resume
FEW = 8  # for jobs that are compared over numbers of processes, whose rounding differs
Job = Callable[..., Path]


def options(
    processes: int = 1, stage: int = 1, micro_batches: int = 1, steps: int = FEW, data_workers: int = 0
) -> dict[str, object]:
    return {
        "data_workers": data_workers,
        "processes": processes,
        "zero_stage": stage,
        "micro_batches": micro_batches,
        "steps": steps,
        "precision": "fp32",
        "evaluate_every": 0,
        "timeout_seconds": 120,
    }


def train(folder: Path, data: Path, fault: str = "", **given: object) -> Path:
    """A whole job's run."""
    file = configuration(folder, data, **options(**given))  # type: ignore[arg-type]
    status, said = finish(start("--config", str(file), "--folder", str(folder / "run"), fault=fault))
    assert status == 0, said
    return folder / "run"


@pytest.fixture(scope="module")
def job(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run of a job with these options that nothing disturbs; each is trained once."""
    known: dict[tuple[tuple[str, object], ...], Path] = {}

    def run(**given: object) -> Path:
        key = tuple(sorted(options(**given).items()))  # type: ignore[arg-type]
        if key not in known:
            known[key] = train(tmp_path_factory.mktemp("job"), data, **given)
        return known[key]

    return run


def parameters(run: Path) -> dict[str, Tensor]:
    return load_file(checkpoint.find(run) / checkpoint.WEIGHTS)


# --- Numbers of processes


def initial_parameters(run: Path) -> dict[str, Tensor]:
    config = checkpoint.read_config(checkpoint.find(run))
    torch.manual_seed(config.job.seed)
    return towers.build(config.model, tuple, files=checkpoint.read_files(checkpoint.find(run))).module.state_dict()


def disagreement(run: Path, other: Path) -> dict[str, float]:
    """The largest relative difference of what both logged, and the parameters' in relation to the way they went."""
    rows = list(zip(training_rows(run), training_rows(other), strict=True))
    logged = {
        name: max(abs(one[name] - two[name]) / max(abs(two[name]), 1e-12) for one, two in rows) for name in rows[0][0]
    }
    ours, theirs, first = parameters(run), parameters(other), initial_parameters(other)
    apart = sum(float((ours[name] - theirs[name]).abs().sum()) for name in first)
    return {**logged, "parameters": apart / sum(float((theirs[name] - first[name]).abs().sum()) for name in first)}


# What rounding does in 8 steps of float32. Sums in another order differ by some 1e-7 of their terms, and Adam divides a
# gradient by its size: an entry that is all rounding moves its parameter as far as any other. Measured: 6e-7 of a loss,
# 2e-6 of a gradient's norm, 3e-4 of the parameters' way.
CLOSE = {"loss": 1e-5, "scale": 1e-5, "grad_norm": 1e-4, "parameters": 0.005}


def exceeded(found: dict[str, float]) -> dict[str, float]:
    """The disagreements that rounding does not explain. What is not in CLOSE must be the same: α, learning
    rate, R@1, skipped steps."""
    return {name: value for name, value in found.items() if not value <= CLOSE.get(name, 0.0)}


@pytest.mark.parametrize(
    ("processes", "stage", "micro_batches"),
    (
        (2, 3, 3),
        pytest.param(2, 1, 1, marks=pytest.mark.long),
        pytest.param(2, 2, 1, marks=pytest.mark.long),
        pytest.param(1, 1, 3, marks=pytest.mark.long),
        pytest.param(4, 1, 1, marks=pytest.mark.long),
        pytest.param(4, 2, 3, marks=pytest.mark.long),
        pytest.param(4, 3, 1, marks=pytest.mark.long),
    ),
)
def test_any_number_of_processes_trains_the_same_model(
    job: Job, processes: int, stage: int, micro_batches: int
) -> None:
    found = disagreement(job(processes=processes, stage=stage, micro_batches=micro_batches), job())
    print(found)
    assert exceeded(found) == {}


def test_a_job_trains_with_the_dense_loss_of_the_share_that_it_logs(job: Job) -> None:
    """Against a few lines of PyTorch in this process: the batch, α, learning rate and clipping of every step."""
    run = job()
    config = checkpoint.read_config(checkpoint.find(run))
    plain, rows = parity.train(parity.problem_of(config), parity.exact), training_rows(run)
    for logged, values in (("loss", plain.losses), ("grad_norm", plain.grad_norms), ("scale", plain.scales)):
        assert [row[logged] for row in rows] == pytest.approx(values, rel=CLOSE[logged]), logged
    for step, row in enumerate(rows):
        assert row["alpha"] == config.loss.alpha()(step)
        target = target_at(step, 16, config.loss, config.job.seed).target  # type: ignore[attr-defined]
        soft = 0 if isinstance(target, Hard) else target.alpha.sum()
        assert soft == round(row["alpha"] * 16)
    assert rows[-1]["alpha"] > 0.3


@pytest.mark.long
def test_ranks_that_train_on_one_share_are_found_out(job: Job, data: Path, tmp_path: Path) -> None:
    """A test of the test."""
    found = exceeded(disagreement(train(tmp_path, data, "one_share_for_all", processes=2), job()))
    assert found.keys() >= {"loss", "grad_norm", "parameters"}, found


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "micro_batches", "message"),
    (
        (3, 1, "optimizer.batch_size=16; allowed: a multiple of the 3 processes"),
        (4, 5, "optimizer.micro_batches=5; allowed: at most 4, a process's share"),
    ),
)
def test_shares_that_would_be_uneven_or_empty_are_refused_before_the_first_step(
    data: Path, tmp_path: Path, processes: int, micro_batches: int, message: str
) -> None:
    file = configuration(tmp_path, data, **options(processes=processes, micro_batches=micro_batches))  # type: ignore[arg-type]
    status, said = finish(start("--config", str(file), "--folder", str(tmp_path / "run")))
    assert status == 2
    assert said.count(message) == 1, said
    assert "Traceback" not in said


# --- Resume


def killed_and_resumed(folder: Path, data: Path, *changed: str, fault: str = "", **given: object) -> tuple[Path, int]:
    """A run whose rank 1 was killed and which then went on to its end, with the options `changed` and `fault`; and the
    step it did so from."""
    file = configuration(folder, data, **options(**given))  # type: ignore[arg-type]
    run = folder / "run"
    job = start("--config", str(file), "--folder", str(run))
    place = wait_for(run, 1, lambda place: place.step >= 9)
    os.kill(place.pid, signal.SIGKILL)
    status, said = finish(job)
    assert status != 0
    assert "rank 1 was the first to fail (killed by SIGKILL" in said
    begun = checkpoint.read_state(checkpoint.find(run)).step
    status, said = finish(start("--resume", str(run), *changed, fault=fault))
    assert status == 0, said
    assert f"steps {begun} to {STEPS}" in said
    return run, begun


def different(run: Path, other: Path) -> list[str]:
    """Which logged numbers and parameters of two runs are not the same to the last bit."""
    rows = zip(training_rows(run), training_rows(other), strict=True)
    logged = [f"{name} of step {one['step']}" for one, two in rows for name in two if one[name] != two[name]]
    ours, theirs = parameters(run), parameters(other)
    return logged + [name for name in theirs if not torch.equal(ours[name], theirs[name])]


# Stage 1 in one pass: test_job_runs.
@pytest.mark.long
@pytest.mark.parametrize(("stage", "micro_batches"), ((0, 1), (2, 1), (3, 1), (0, 3), (1, 3), (2, 3), (3, 3)))
def test_a_killed_run_resumes_bitwise_at_every_stage_and_in_two_passes(
    job: Job, data: Path, tmp_path: Path, stage: int, micro_batches: int
) -> None:
    given = {"processes": 2, "stage": stage, "micro_batches": micro_batches, "steps": STEPS}
    run, begun = killed_and_resumed(tmp_path, data, **given)
    assert 8 <= begun <= STEPS - RESUMED
    assert different(run, job(**given)) == []
    schedule = Config.from_dict(tiny(data)).loss.alpha()
    assert [row["alpha"] for row in training_rows(run)] == [schedule(step) for step in range(STEPS)]


@pytest.mark.long
def test_a_killed_run_resumes_bitwise_with_any_number_of_workers(job: Job, data: Path, tmp_path: Path) -> None:
    """Two before and four after, against one without any."""
    run, begun = killed_and_resumed(tmp_path, data, "data.workers=4", processes=2, steps=STEPS, data_workers=2)
    assert 8 <= begun <= STEPS - RESUMED
    assert different(run, job(processes=2, steps=STEPS)) == []


@pytest.mark.long
def test_a_run_goes_on_with_other_numbers_of_processes_at_other_stages(job: Job, data: Path, tmp_path: Path) -> None:
    """Two, then four, then one, against two throughout. Measured: 1e-7 of a loss, 4e-6 of the parameters' way."""
    file = configuration(tmp_path, data, **options(processes=2, steps=3 * FEW))  # type: ignore[arg-type]
    run = tmp_path / "run"
    for number, arguments in enumerate(
        (
            ("--config", str(file), "--folder", str(run)),
            ("--resume", str(run), "job.processes=4", "job.zero_stage=3"),
            ("--resume", str(run), "job.processes=1", "job.zero_stage=0"),
        ),
        1,
    ):
        status, said = finish(start(*arguments, "--stop-after", str(number * FEW)))
        assert status == 0, said
    found = disagreement(run, job(processes=2, steps=3 * FEW))
    print(found)
    assert {name: value for name, value in found.items() if not value <= CLOSE.get(name, 0.0)} == {}


@pytest.mark.long
def test_moments_that_are_forgotten_at_a_resume_are_found_out(job: Job, data: Path, tmp_path: Path) -> None:
    """A test of the test."""
    given = {"processes": 2, "steps": STEPS}
    run, begun = killed_and_resumed(tmp_path, data, fault="forgotten_moments", **given)
    found = different(run, job(**given))
    assert f"loss of step {begun}" not in found
    assert f"loss of step {begun + 1}" in found
