"""Whole training jobs of two processes on the CPU, as users start them: what a run leaves, and what resuming gives.

Each start costs about ten seconds of imports, so that one job serves several checks.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.data import CONCEPTS, make_data, tiny
from helpers.jobs import configuration, finish, start, training_rows, wait_for
from helpers.saved_runs import altered, rewrite_manifest
from safetensors.torch import load_file

from train import checkpoint, heartbeat, metrics, plot, towers
from train.config import Config
from train.data import noise, open_training_data
from train.evaluate import report
from train.evaluate.__main__ import main

STEPS = 24
NOISE = ("data.noise.swap=0.2", "data.noise.junk=0.1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), without_caption=1)


@pytest.fixture(scope="module")
def whole_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    job = start("--config", str(configuration(folder, data)), "--folder", str(folder / "run"), *NOISE)
    status, said = finish(job)
    assert status == 0, said
    assert "| heldout | 39 | 39 |" in said
    assert "80 pairs (bad samples left out: none; captions made wrong: swap 16, junk 8), 2 × cpu" in said
    assert "bad samples replaced: 1 (empty_caption 1)" in said
    assert re.search(
        r"2 × cpu, 1 CPU thread\(s\) each, ZeRO-1, (bf16|fp32) \(auto\), backend \w+ .*, steps 0 to 24; ready in", said
    ), said
    return folder / "run"


def test_a_run_leaves_all_it_promises(whole_run: Path, data: Path) -> None:
    rows = metrics.read_rows(whole_run / metrics.METRICS)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(STEPS))
    schedule = Config.from_dict(tiny(data)).loss.alpha()
    assert [row["alpha"] for row in steps] == [schedule(step) for step in range(STEPS)]
    assert all(row["grad_norm"] > 0 and row["samples_per_second"] > 0 and row["skipped"] == 0 for row in steps)
    assert all(one["bad"] <= other["bad"] for one, other in itertools.pairwise(steps))
    assert 1 <= steps[-1]["bad"] <= 24
    assert all(0 < row["data_seconds"] < row["step_seconds"] and row["memory_bytes"] > 1e8 for row in steps)
    apart = [row[name] for row in steps for name in ("r1_clean", "r1_noisy") if row[name] is not None]
    assert len(apart) > STEPS and all(0 <= value <= 1 for value in apart), "but where a batch has none"
    account = gzip.decompress((whole_run / noise.ACCOUNT).read_bytes()).decode().splitlines()
    assert account[0] == "key,kind,from,caption" and 22 <= len(account) - 1 <= 24, "but for what cannot be read"
    assert [row["samples_seen"] for row in steps] == [16 * (step + 1) for step in range(STEPS)]
    table, figures = ((whole_run / name).read_text() for name in (report.TABLE, report.FIGURES))
    assert "Bad samples left out: heldout: 1 (empty_caption 1); " in table
    assert json.loads(figures)["left_out"]["vendor"] == {"empty_caption": 1}
    on_the_way = [row for row in rows if "heldout_r1_image_to_text" in row]
    assert [row["step"] for row in on_the_way] == [5, 11, 17, 23]
    at_the_end = json.loads(figures)["results"][0]["metrics"]
    assert on_the_way[-1]["heldout_r1_image_to_text"] == at_the_end["text_retrieval_recall@1"]
    assert on_the_way[-1]["heldout_r1_text_to_image"] == at_the_end["image_retrieval_recall@1"]
    ways = ("heldout_r1_image_to_text", "heldout_r1_text_to_image")
    assert len({tuple(row[way] for way in ways) for row in on_the_way}) > 1, "of the weights of each step"
    assert (whole_run / plot.PLOT).read_bytes().startswith(b"\x89PNG")
    assert list((whole_run / metrics.EVENTS).iterdir())
    assert {place.phase for place in heartbeat.read(whole_run)} == {"done"}
    found = checkpoint.find(whole_run)
    assert not [path for path in found.rglob("*") if path.suffix in (".py", ".sh")], "no code in a checkpoint"
    training = open_training_data(Config.from_dict(tiny(data)))
    files = towers.build(Config.from_dict(tiny(data)).model, training.captions).files
    assert checkpoint.read_bundle(found).files == files, "only training captions may teach it"


def test_evaluate_reads_the_same_table_back(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = {name: (whole_run / name).read_bytes() for name in (report.TABLE, report.FIGURES)}
    for name in written:
        (whole_run / name).unlink()
    assert main([str(whole_run)]) == 0
    assert {name: (whole_run / name).read_bytes() for name in written} == written
    said = capsys.readouterr().out
    assert said.rstrip().endswith(written[report.TABLE].decode().rstrip().splitlines()[-1])
    (whole_run / report.FIGURES).unlink()
    assert main([str(whole_run), "--processes", "2"]) == 0
    assert {name: (whole_run / name).read_bytes() for name in written} == written


def test_a_killed_run_says_who_and_resumes_bitwise_from_the_last_good_checkpoint(
    whole_run: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start("--config", str(configuration(tmp_path, data)), "--folder", str(run), *NOISE)
    place = wait_for(run, 1, lambda place: place.step >= 9)
    os.kill(place.pid, signal.SIGKILL)
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
    assert f"steps 4 to {STEPS}" in said
    ours, theirs = (load_file(checkpoint.find(one) / checkpoint.WEIGHTS) for one in (run, whole_run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert training_rows(run) == training_rows(whole_run)
    figures = [json.loads((one / report.FIGURES).read_text()) for one in (run, whole_run)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("before", "after", "named"),
    (
        ("seed: 0", "seed: 1", "with other options than it was trained with: data.seed=0 then, 1 now; job.seed"),
        (
            "initial_scale: null",
            "initial_scale: 10.0",
            "with other options than it was trained with: model.initial_scale",
        ),
    ),
)
def test_what_a_run_cannot_go_on_with_is_named_once(
    whole_run: Path, tmp_path: Path, before: str, after: str, named: str
) -> None:
    status, said = finish(start("--resume", str(altered(whole_run, tmp_path / "run", before, after))))
    assert status == 2
    assert said.count(named) == 1
    assert "was the first to fail" not in said and "Traceback" not in said


def test_other_data_are_refused_and_damaged_ones_named(whole_run: Path, data: Path, tmp_path: Path) -> None:
    other = make_data(tmp_path / "other", concepts=CONCEPTS + 1, without_caption=1)
    status, said = finish(start("--resume", str(altered(whole_run, tmp_path / "run", str(data), str(other)))))
    assert status == 2
    assert said.count("was trained on other data (fingerprint ") == 1
    (other / "vendor-000000.tar").write_bytes(b"?" * 10_240)
    status, said = finish(start("--resume", str(tmp_path / "run")))
    assert status == 2
    assert said.count("vendor-000000.tar") == 1
    assert "Traceback" not in said


def test_other_versions_are_named_and_the_run_goes_on(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    found = checkpoint.find(run)
    written = json.loads((found / checkpoint.FINGERPRINT).read_text())
    written["versions"]["torch"] = "1.0"
    (found / checkpoint.FINGERPRINT).write_text(json.dumps(written))
    rewrite_manifest(found)
    status, said = finish(start("--resume", str(run)))
    assert status == 0, said
    assert said.count(f"{found.name} was written by other software") == 1
    assert "torch 1.0, now " in said


def test_resume_refuses_to_stop_before_the_steps_that_are_done(whole_run: Path) -> None:
    status, said = finish(start("--resume", str(whole_run), "--stop-after", "23"))
    assert status == 2
    assert said.count(f"--stop-after 23, but {whole_run / checkpoint.FOLDER}/step-000024 has done 24 steps") == 1
