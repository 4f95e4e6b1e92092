"""Whole training jobs of two processes on the CPU that must not save, or cannot. Each start costs about ten seconds of
imports, so that one job serves several checks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.jobs import configuration, finish, start, steps_logged
from helpers.saved_runs import Payload, checkpoint_names, rewrite_manifest

from train import checkpoint, metrics
from train.evaluate import report


def test_moments_that_are_not_finite_are_never_saved(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = configuration(tmp_path, data)
    status, said = finish(start("--config", str(file), "--folder", str(run), fault="nan_moment_on_rank_1"))
    assert status == 1, said
    assert re.search(r"error: rank 0, step 7, saving: the checkpoint of step 8 is not written.* \(exp_avg\)", said)
    assert said.count("is not written") == 1
    assert "Traceback" not in said
    assert checkpoint_names(run) == ["latest", "step-000004"]
    assert checkpoint.find(run).name == "step-000004"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_leaves_the_last_good_checkpoint_and_one_sentence(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = configuration(tmp_path, data, steps=12)
    status, said = finish(start("--config", str(file), "--folder", str(run), fault="full_disk"))
    assert status == 1, said
    assert said.count(f"warning: {metrics.METRICS} cannot be written (No space left on device: ") == 1, said
    assert said.count(f"warning: {metrics.EVENTS} cannot be written (No space left on device: ") == 1, said
    problem = r"error: rank 1, step 7, saving: the checkpoint of step 8 cannot be written \(No space left on device: "
    assert len(re.findall(problem + r".*rank-00001\.pt \([0-9.]+ MB free\)\); those before it are as they", said)) == 1
    assert said.count("cannot be written") == 3
    assert "Traceback" not in said
    assert checkpoint_names(run) == ["latest", "step-000004"], "nothing half-written stays"

    # Gone on with by other software, to another step than it was begun for. There is a newer checkpoint with a payload,
    # and the table cannot be written.
    folder = run / checkpoint.FOLDER / "step-000004"
    fingerprint = json.loads((folder / checkpoint.FINGERPRINT).read_text())
    fingerprint["versions"]["torch"] = "1.0"
    (folder / checkpoint.FINGERPRINT).write_text(json.dumps(fingerprint))
    rewrite_manifest(folder)
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace("steps: 12\n", "steps: 9\n"))
    (run / report.TABLE).mkdir()
    planted = run / checkpoint.FOLDER / "step-000006"
    shutil.copytree(folder, planted)
    torch.save({"module": Payload(tmp_path / "was run")}, next((planted / checkpoint.ENGINE).glob("rank-*.pt")))
    rewrite_manifest(planted)
    (run / checkpoint.FOLDER / checkpoint.LATEST).write_text(planted.name)
    status, said = finish(start("--resume", str(run)))
    assert status == 1, said
    assert "checkpoint step-000006 cannot be used (UnpicklingError: " in said
    assert not (tmp_path / "was run").exists()
    assert "| heldout | 40 | 40 |" in said, "what cannot be written is said"
    assert f"error: rank 0, step 9, evaluation: Is a directory: {run / report.TABLE}. Last seen" in said
    assert "Traceback" not in said
    assert (
        said.count("going on with other options than step-000004 was written with: optimizer.steps=12 then, 9 now") == 1
    )
    assert said.count("step-000004 was written by other software, and may not go on bit for bit: torch 1.0, now ") == 1
    assert checkpoint_names(run) == ["latest", "step-000008", "step-000009"]
    assert steps_logged(run) == list(range(9))
