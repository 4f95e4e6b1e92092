"""What the command line of the trainer takes and refuses, without processes of its own."""

from __future__ import annotations

import ast
import errno
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.data import tiny

from train import PROGRAM, launch, lock
from train.__main__ import COMMANDS
from train.__main__ import main as start
from train.cli import _asked_for, main, parse
from train.config import Config, load


def run_main(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(arguments)
    return status, capsys.readouterr().err


def test_what_cannot_be_run_is_refused_with_the_way_out(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(["job.sede=1"], capsys)[0] == 2
    assert "unknown option of 'job': sede" in run_main(["job.sede=1"], capsys)[1]
    assert "no config.yaml there" in run_main(["--resume", str(tmp_path)], capsys)[1]
    assert "leave out --config" in run_main(["--resume", str(tmp_path), "--folder", "other"], capsys)[1]
    assert "give --folder" in run_main(["--resume", "auto"], capsys)[1]
    assert "--stop-after 0" in run_main(["--stop-after", "0"], capsys)[1]
    assert f"the run {tmp_path} exists" in run_main(["--folder", str(tmp_path)], capsys)[1]
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in run_main(["--folder", str(tmp_path / "gpu"), "job.device=cuda"], capsys)[1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "give --folder" in run_main([], capsys)[1]


def test_options_stand_in_any_order() -> None:
    options = parse(["job.seed=1", "--folder", "there", "loss.target=hard", "--stop-after", "3", "optimizer.steps=9"])
    assert options.overrides == ["job.seed=1", "loss.target=hard", "optimizer.steps=9"]
    assert (options.folder, options.stop_after) == (Path("there"), 3)


def test_a_run_that_kept_nothing_goes_on_with_any_options(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose first start found the batch larger than the data."""
    monkeypatch.setattr(launch, "launch", lambda *_: 0)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(Config.from_dict(tiny(data)).to_yaml())
    assert run_main(["--resume", str(run), "optimizer.batch_size=8", "job.seed=3"], capsys) == (0, "")
    kept = load(run / "config.yaml")
    assert (kept.optimizer.batch_size, kept.job.seed) == (8, 3)
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    assert "cannot go on with another job.seed" in run_main(["--resume", str(run), "job.seed=4"], capsys)[1]


def test_a_run_is_named_by_its_configuration() -> None:
    asked = {
        name: _asked_for(parse(given))[1].name for name, given in {"emoji": [], "pairs": ["data.source=x"]}.items()
    }
    assert all(run.startswith(f"{name}-") for name, run in asked.items()), asked


@pytest.mark.parametrize("command", COMMANDS)
def test_the_other_commands_are_listed_and_run_without_what_training_sets_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert f"\n  {PROGRAM} {command} " in capsys.readouterr().out
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["train", command, "--nonsense"])
    with pytest.raises(SystemExit) as left:
        start()
    assert left.value.code == 2
    assert f"usage: {PROGRAM} {command} " in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(launch, "launch", lambda *_: 0)
    status, said = run_main(["--folder", str(tmp_path / "run"), "job.report=trackio"], capsys)
    assert (status, list(tmp_path.iterdir())) == (2, [])
    assert said == (
        "error: job.report='trackio', but trackio is not installed; pip install trackio, or leave job.report out\n"
    )
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():  # which reports nothing, perhaps on another machine
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("train.cli._run_rank", lambda *_: 0)
    assert main(["--folder", str(tmp_path / "run"), "job.report=trackio"]) == 0


@pytest.fixture
def stopped_run(tmp_path: Path, data: Path) -> Path:
    """A run of twelve steps that has done eight, as far as the command line looks."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000008").mkdir(parents=True)
    (run / "config.yaml").write_text(Config.from_dict(tiny(data)).to_yaml())
    return run


@pytest.mark.parametrize(
    ("overrides", "messages"),
    (
        (
            ["optimizer.lr=0.5", "optimizer.steps=20"],
            ("cannot go on with another optimizer.lr (the run's: 0.0015, asked for: 0.5); allowed: data.source, ",),
        ),
        (
            ["model.text_width=32", "job.seed=3"],
            ("another model.text_width (the run's: 16, asked for: 32), job.seed ",),
        ),
        (["optimizer.steps=7"], ("optimizer.steps=7, but the run ", " has done 8 steps; allowed: that or more")),
        (["job.sede=1"], ("unknown option of 'job': sede",)),
    ),
)
def test_what_a_run_cannot_go_on_with_is_named_and_nothing_changed(
    stopped_run: Path, data: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], messages: tuple[str, ...]
) -> None:
    before = (stopped_run / "config.yaml").read_bytes()
    same = stopped_run.with_name("same.yaml")
    same.write_bytes(before)
    for how in (
        ["--resume", str(stopped_run)],
        ["--resume", "auto", "--folder", str(stopped_run), "--config", str(same)],
    ):
        status, said = run_main([*overrides, *how], capsys)
        assert status == 2
        assert all(message in said for message in messages), said
        assert said.count("\n") == 1
    assert (stopped_run / "config.yaml").read_bytes() == before
    assert sorted(path.name for path in stopped_run.iterdir()) == ["checkpoints", "config.yaml"]


def test_what_a_run_can_go_on_with_is_kept_and_the_run_held(
    stopped_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[list[str]] = []
    monkeypatch.setattr(launch, "launch", lambda count, run, arguments, held: jobs.append(arguments) or 0)
    assert main(["job.evaluate_every=3", "--resume", str(stopped_run), "optimizer.steps=20"]) == 0
    kept = load(stopped_run / "config.yaml")
    assert (kept.optimizer.steps, kept.job.evaluate_every) == (20, 3)
    again = stopped_run.with_name("again.yaml")
    again.write_text(kept.to_yaml())
    for run in (stopped_run, stopped_run.with_name("new")):
        assert main(["--resume", "auto", "--folder", str(run), "--config", str(again)]) == 0
        assert load(run / "config.yaml") == kept
    assert jobs == [["--resume", str(run)] for run in (stopped_run, stopped_run, stopped_run.with_name("new"))]
    with lock.hold(stopped_run):
        status, said = run_main(["--resume", str(stopped_run)], capsys)
    assert status == 2
    assert re.search(rf"run {stopped_run} is in use by process {os.getpid()} on \S+ since 2\d+-", said), said
    assert len(jobs) == 3


def test_a_file_system_without_locks_is_said(
    stopped_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    lock.hold(stopped_run).close()
    assert "has no locks (No locks available): nothing keeps a second job" in capsys.readouterr().err


def test_no_message_advises_to_delete_data() -> None:
    """Of all that the trainer says: its strings, docstrings aside."""
    advice = re.compile(r"\b(delete|rm -r|wipe|erase)\b|remove the (data|folder|shard|cache)", re.IGNORECASE)
    found = []
    for path in sorted((ROOT / "train").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        spoken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
                found += [f"{path.name}: {node.value}"] if advice.search(node.value) else []
    assert not found
