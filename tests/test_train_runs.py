"""Whole training jobs of two processes on the CPU, as users start them, with ranks killed, stopped and fed NaN.

Each start costs about ten seconds of imports, so that one job serves several checks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_data import make_data, tiny

from train import checkpoint, evaluate, logs, progress
from train.config import Config
from train.data import load_pairs
from train.samples import all_captions
from train.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and everything said; whatever is left of the job's processes is an error, and ended."""
    try:
        said = "".join(job.communicate(timeout=TIMEOUT))
    finally:
        try:
            os.killpg(job.pid, signal.SIGKILL)
            left = True
        except ProcessLookupError:
            left = False
    assert not left, "processes outlived the job"
    return job.returncode, said


def configuration(folder: Path, data: Path, steps: int = 12, **job: Any) -> Path:
    sections = tiny(data, **job)
    sections["optimizer"]["steps"] = steps
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    return folder / "tiny.yaml"


def wait_for_step(run: Path, rank: int, step: int) -> progress.Place:
    """The place of a rank once it is at `step` or later."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        for place in progress.read(run):
            if place.rank == rank and place.step >= step:
                return place
        time.sleep(0.005)
    raise AssertionError(f"rank {rank} never came to step {step}")


def training_rows(run: Path) -> list[dict[str, Any]]:
    """The logged numbers that depend on the training alone, not on the clock."""
    rows = logs.read_rows(run / logs.METRICS)
    return [{name: value for name, value in row.items() if name != "samples_per_second"} for row in rows]


@pytest.fixture(scope="module")
def whole_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    job = start("--config", str(configuration(folder, data)), "--folder", str(folder / "run"))
    status, said = finish(job)
    assert status == 0, said
    assert "| held-out drawings | 40 | 40 |" in said
    return folder / "run"


def test_a_run_leaves_all_it_promises(whole_run: Path, data: Path) -> None:
    rows = logs.read_rows(whole_run / logs.METRICS)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(12))
    schedule = Config.from_dict(tiny(data)).loss.alpha()
    assert [row["alpha"] for row in steps] == [schedule(step) for step in range(12)]
    assert all(row["grad_norm"] > 0 and row["samples_per_second"] > 0 and row["skipped"] == 0 for row in steps)
    assert [row["step"] for row in rows if "heldout_r1_image_to_text" in row] == [5, 11]
    assert (whole_run / logs.PLOT).read_bytes().startswith(b"\x89PNG")
    assert list((whole_run / logs.EVENTS).iterdir())
    assert {place.phase for place in progress.read(whole_run)} == {"done"}
    found = checkpoint.find(whole_run)
    assert not [path for path in found.rglob("*") if path.suffix in (".py", ".sh")], "no code in a checkpoint"
    tokenizer = train_tokenizer(all_captions(load_pairs(data, "train")), 300)
    assert checkpoint.read_tokenizer(found).get_vocab() == tokenizer.get_vocab(), "only training captions may teach it"


def test_evaluate_reads_the_same_table_back(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = {name: (whole_run / name).read_bytes() for name in (evaluate.TABLE, evaluate.FIGURES)}
    for name in written:
        (whole_run / name).unlink()
    assert evaluate.main([str(whole_run)]) == 0
    assert {name: (whole_run / name).read_bytes() for name in written} == written
    assert capsys.readouterr().out.rstrip().endswith(written[evaluate.TABLE].decode().rstrip().splitlines()[-1])


def test_a_killed_run_says_who_and_resumes_bitwise_from_the_last_good_checkpoint(
    whole_run: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start("--config", str(configuration(tmp_path, data)), "--folder", str(run))
    wait_for_step(run, 1, 9)
    os.kill(next(place.pid for place in progress.read(run) if place.rank == 1), signal.SIGKILL)
    status, said = finish(job)
    assert status != 0
    assert "rank 1 was the first to fail (killed by SIGKILL" in said
    assert "rank 1: step " in said
    assert f"--resume {run}" in said

    newest = checkpoint.find(run)
    assert newest.name == "step-000008"
    weights = newest / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-7])
    status, said = finish(start("--resume", str(run)))
    assert status == 0, said
    assert "step-000008 is not whole" in said
    assert "steps 4 to 12" in said
    ours, theirs = (load_file(checkpoint.find(one) / checkpoint.WEIGHTS) for one in (run, whole_run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert training_rows(run) == training_rows(whole_run)
    figures = [json.loads((one / evaluate.FIGURES).read_text()) for one in (run, whole_run)]
    assert figures[0] == figures[1]


def test_a_stopped_rank_ends_the_job_within_the_time_out(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start("--config", str(configuration(tmp_path, data, steps=5000, timeout_seconds=8)), "--folder", str(run))
    place = wait_for_step(run, 1, 2)
    os.kill(place.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    status, said = finish(job)
    waited = time.monotonic() - stopped
    assert status != 0
    assert waited < 60, f"time-out 8 s, then the launcher's 30 s before it kills; took {waited:.0f} s"
    assert "error: rank 0, step " in said
    assert "rank 1: step " in said
    assert ", silent for " in said


def test_resume_refuses_another_number_of_processes(whole_run: Path, tmp_path: Path) -> None:
    settings = (whole_run / "config.yaml").read_text()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(settings.replace("processes: 0", "processes: 1"))
    (run / checkpoint.FOLDER).symlink_to(whole_run / checkpoint.FOLDER)
    status, said = finish(start("--resume", str(run)))
    assert status == 2
    assert "written with job.processes=2 and this job has 1" in said
    assert "was the first to fail" not in said


# Stage 1 is the default; stage 3 cuts the parameters themselves, so that the clamp and the checks meet other code.
@pytest.mark.parametrize("stage", (1, 3))
def test_nothing_is_updated_where_a_loss_or_gradient_is_not_finite(data: Path, tmp_path: Path, stage: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "tests" / "train_worker.py"), str(data), str(tmp_path), str(stage)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        scales = seen.pop("master scale"), seen.pop("scale seen by the next step")
        assert all(value is True for value in seen.values()), seen
        assert max(scales) <= 100.0 * (1 + 1e-6)
        assert min(scales) > 90.0
