"""The grid: which runs it starts, what it keeps of them, and how it ends and goes on."""

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
import yaml
from helpers import PYTHONPATH, ROOT
from helpers.data import tiny
from helpers.jobs import TIMEOUT, finish, start
from helpers.saved_runs import FINGERPRINT, write_checkpoint

from train import lock
from train.signals import LAUNCHER, STOPPED, stop
from train.study import compare, grid
from train.study.finished import LINES, commit_of, folder_in, read_lines, steps_done
from train.study.jobs import Ended, Job, carry_out
from train.study.plan import read_study

STEPS = 60


def write_study(folder: Path, pairs: Path, **base: Any) -> Path:
    """Hard and PSD at two seeds."""
    sections = tiny(pairs, evaluate_every=0, checkpoint_every=10)
    sections["optimizer"]["steps"] = STEPS
    for name, options in base.items():
        sections[name] |= options
    runs = {"hard": {"loss.target": "hard"}, "psd": {"loss.target": "psd"}}
    given = {"base": sections, "seeds": [1, 2], "runs": runs, "reference": "hard"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "asked.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return folder / "asked.yaml"


def lines_of(study: Path) -> list[str]:
    path = study / LINES
    return path.read_text().splitlines() if path.exists() else []


def test_a_grid_that_is_killed_goes_on_and_prints_its_comparison(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, study = write_study(tmp_path, data), tmp_path / "study"
    arguments = ("grid", str(file), "--folder", str(study), "--parallel", "2")
    names = [run.name for run in read_study(file).runs]
    job = start(*arguments)
    end = time.monotonic() + TIMEOUT
    while not (begun := [name for name in names if steps_done(folder_in(study, name)) > 0]) or not lines_of(study):
        assert time.monotonic() < end and job.poll() is None, job.communicate()
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    finish(job)
    before = lines_of(study)
    done = [json.loads(line)["run"] for line in before]
    assert 1 <= len(done) < len(names) and begun

    status, said = finish(start(*arguments), 3 * TIMEOUT)  # two or three runs
    assert status == 0, said
    assert lines_of(study)[: len(before)] == before  # no finished run was touched
    assert [name for name in names if f"{name}: begins" in said] == [name for name in names if name not in done]
    for name in set(begun) - set(done):
        assert f"{name}: begins from step " in said
    lines = read_lines(study)
    assert sorted(lines) == sorted(names)
    assert all(line["training"]["step"] == STEPS - 1 for line in lines.values())

    assert compare.main([str(study)]) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| vendor/text_retrieval_recall@1")]
    assert [row.split(" | ")[1] for row in rows] == ["hard", "psd"] and "[" in rows[1], rows


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without signal handlers, and what else of a process of its own outlasts a test."""
    monkeypatch.setattr(stop, "listen", lambda: None)
    monkeypatch.setattr(stop, "act_at_once", lambda act: None)
    monkeypatch.setattr(stop, "hurry", lambda: None)
    monkeypatch.setattr(grid, "PATIENCE", 0.0)


@pytest.fixture
def finished(tmp_path: Path, data: Path, files: dict[str, bytes], quiet: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study whose runs of `hard` have their last checkpoint, and whose runs are commands that train nothing: those
    of `psd` fail."""
    study = tmp_path / "study"
    for seed in (1, 2):
        folder = folder_in(study, f"hard/seed-{seed}")
        folder.mkdir(parents=True)
        write_checkpoint(folder, data, files, step=STEPS)
        (folder / "evaluation.json").write_text(json.dumps({"seed": seed}))
        (folder / "metrics.jsonl").write_text('{"step": 58, "loss": 2.0}\n{"step": 59, "loss": 1.0}\n{"step": 59}\n')
        config = read_study(write_study(tmp_path, data)).runs[2 * seed - 2].config
        (folder / "config.yaml").write_text(config.to_yaml())
    command = 'echo "$*"; case "$*" in *psd*) exit 3; esac'
    monkeypatch.setattr(grid, "_command", lambda *given: ["sh", "-c", command, "sh", *given])
    return study


def run_grid(capsys: pytest.CaptureFixture[str], study: Path, *arguments: str) -> tuple[int, str, str]:
    status = grid.main([str(study.parent / "asked.yaml"), "--folder", str(study), "--parallel", "2", *arguments])
    return status, *capsys.readouterr()


def test_a_run_that_fails_is_named_and_the_others_go_on(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, errors = run_grid(capsys, finished)
    assert status == grid.FAILED
    assert "hard/seed-2: finished in" in said and "psd/seed-1: failed (exit status 3)" in said
    assert errors.splitlines() == [
        f"error: psd/seed-{seed} failed; what it said is in {finished}/runs/psd/seed-{seed}.log" for seed in (1, 2)
    ]
    log = (finished / "runs" / "psd" / "seed-1.log").read_text()
    asked = f"{finished}/runs/psd/seed-1"
    assert log == f"--config {asked}.yaml --folder {asked} --resume auto\n"
    line = read_lines(finished)["hard/seed-2"]
    assert (line["condition"], line["method"], line["seed"], line["results"]) == ("", "hard", 2, {"seed": 2})
    assert line["training"] == {"step": 59, "loss": 1.0}
    assert line["fingerprint"]["code"] == FINGERPRINT.code and line["first_step"] == STEPS
    assert (line["configuration"]["job"]["seed"], line["configuration"]["loss"]["target"]) == (2, "hard")
    assert line["wall_seconds"] >= 0 and line["commit"] == commit_of(Path(grid.__file__))
    assert read_study(finished / "study.yaml").runs == read_study(finished.parent / "asked.yaml").runs
    # What is finished is left alone, and what failed is tried again.
    _, again, _ = run_grid(capsys, finished)
    assert "hard" not in again and again.count(": begins") == 2


def test_a_dry_run_lists_the_runs_and_does_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_grid(capsys, finished, "--dry-run")[:2] == (
        0,
        f"hard/seed-1: {STEPS} of {STEPS} steps\npsd/seed-1: not begun\nhard/seed-2: {STEPS} of {STEPS} steps\n"
        "psd/seed-2: not begun\n0 of 4 runs are finished\n",
    )
    assert not (finished / "study.yaml").exists()
    run_grid(capsys, finished)
    assert "hard/seed-1: finished\n" in run_grid(capsys, finished, "--dry-run")[1]


def test_finished_runs_are_evaluated_again(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_grid(capsys, finished)
    before = read_lines(finished)
    command = '[ "$1" = evaluate ] && echo \'["anew"]\' > "$2/evaluation.json"'
    monkeypatch.setattr(grid, "_command", lambda *given: ["sh", "-c", command, "sh", *given])
    status, said, _ = run_grid(capsys, finished, "--evaluate-again")
    assert (status, sorted(said.splitlines())) == (0, ["hard/seed-1: evaluated", "hard/seed-2: evaluated"])
    assert read_lines(finished) == {name: {**line, "results": ["anew"]} for name, line in before.items()}
    monkeypatch.setattr(grid, "_command", lambda *_: ["false"])
    status, said, errors = run_grid(capsys, finished, "--evaluate-again")
    assert status == grid.FAILED and "hard/seed-1 failed" in errors
    assert read_lines(finished)["hard/seed-1"]["results"] == ["anew"]


def test_what_a_grid_cannot_do_is_refused_before_anything_starts(
    finished: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        status, said, errors = run_grid(capsys, finished, *arguments)
        assert (status, said) == (2, "")
        return errors

    assert "--parallel 0; allowed: 1 or more" in refused("--parallel", "0")
    assert "--niceness 20; allowed: 0 to 19" in refused("--niceness", "20")
    write_study(finished.parent, data, optimizer={"steps": 70})
    expected = f"the run hard/seed-1 of {finished} has another optimizer.steps (then {STEPS}, now 70)"
    assert expected in refused()  # by its checkpoint
    write_study(finished.parent, data)
    run_grid(capsys, finished)
    write_study(finished.parent, data, optimizer={"steps": 70})
    (folder_in(finished, "hard/seed-1") / "config.yaml").unlink()
    assert expected in refused()  # by its line
    write_study(finished.parent, data, data={"evaluate": {"vendor": str(data / "nowhere.tar")}})
    assert "has another data.evaluate" in refused()
    (finished / LINES).unlink()
    for seed in (1, 2):
        os.rename(folder_in(finished, f"hard/seed-{seed}"), finished / f"moved-{seed}")
    assert "nowhere.tar" in refused()
    write_study(finished.parent, data)
    with lock.hold(finished, what="study"):
        assert f"the study {finished} is in use by process {os.getpid()}" in refused()


def shell(name: str, command: str, folder: Path) -> Job:
    return Job(name, ["sh", "-c", command], folder / "logs" / f"{name}.log")


def test_jobs_run_side_by_side_in_order_and_say_what_they_took(tmp_path: Path) -> None:
    said, most, now = [], 0, 0

    def began(job: Job) -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        said.append(job.name)

    statuses: dict[str, Ended] = {}

    def ended(job: Job, how: Ended) -> None:
        nonlocal now
        now -= 1
        statuses[job.name] = how

    count = "i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done"
    commands = {
        "busy": f"sh -c '{count}'; exit 4",
        "killed": "kill -9 $$",
        "idle": "sleep 0.5; echo idle >&2",
        "last": "echo $WHO",
    }
    listed = [shell(name, command, tmp_path) for name, command in commands.items()]
    carry_out(listed, 2, {**os.environ, "WHO": "me"}, began, ended)
    assert said == list(commands) and most == 2
    assert {name: how.status for name, how in statuses.items()} == {"busy": 4, "killed": -9, "idle": 0, "last": 0}
    assert statuses["idle"].wall_seconds >= 0.5 > 0.1 > statuses["idle"].processor_seconds
    assert statuses["busy"].processor_seconds > 0.05  # by a process of its own
    assert [(tmp_path / "logs" / f"{name}.log").read_text() for name in ("idle", "last")] == ["idle\n", "me\n"]


def test_jobs_that_are_asked_to_stop_do_so_in_their_own_time(
    tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "request", 0)
    politely = "trap 'sleep {}; echo kept; exit 75' TERM; echo ready; while true; do sleep 0.05; done"
    commands = {"first": politely.format(0.1), "second": politely.format(0.6), "third": "echo ready"}
    listed = [shell(name, command, tmp_path) for name, command in commands.items()]  # the first leaves room
    begun, statuses = [], {}

    def began(job: Job) -> None:
        begun.append(job.name)
        while not job.log.read_text():
            time.sleep(0.01)
        if len(begun) == 2:
            stop.request = signal.SIGTERM

    carry_out(listed, 2, os.environ, began, lambda job, how: statuses.update({job.name: how.status}))
    assert (begun, statuses) == (["first", "second"], {"first": STOPPED, "second": STOPPED})
    assert listed[0].log.read_text() == "ready\nkept\n"


def test_a_grid_that_is_asked_to_stop_says_how_to_go_on(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def carry(listed: list[Job], parallel: int, environment: dict[str, str], began: Any, ended: Any) -> None:
        ended(listed[0], Ended(0, 1.0, 1.0))
        monkeypatch.setattr(stop, "request", signal.SIGTERM)
        ended(listed[1], Ended(STOPPED, 1.0, 1.0))

    monkeypatch.setattr(grid, "carry_out", carry)
    status, _, errors = run_grid(capsys, finished)
    assert status == STOPPED and list(read_lines(finished)) == ["hard/seed-1"]
    assert errors == (
        "stopped by SIGTERM: 1 of 4 runs are finished, and those that had begun have their checkpoints; go on with the "
        "same command\n"
    )


@pytest.mark.parametrize(("rank", "said"), (({}, "still here 999\n"), ({"RANK": "0"}, "")), ids=("a run", "a rank"))
def test_a_run_whose_grid_is_gone_stops_by_itself(rank: dict[str, str], said: str) -> None:
    """It is asked to; it may take longer than a rank, which it waits for."""
    program = (
        "import time; from train import signals; signals.ORPHAN_SECONDS = 0.1; signals.LOOK_SECONDS = 0.05; "
        "signals.stop.act_at_once(None); signals.stop.listen(); time.sleep(1); "
        "print('still here', signals.stop.request)"
    )
    environment = {**os.environ, **rank, LAUNCHER: "1", "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode, bool(done.stderr)) == (said, STOPPED if rank else 0, bool(rank)), done.stderr


def test_runs_take_a_core_each_unless_they_say_otherwise(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.threads.cpu_count", lambda: 8)
    assert grid._fitting(read_study(write_study(tmp_path, data)).runs) == 8
    assert grid._fitting(read_study(write_study(tmp_path, data, job={"processes": 2, "threads": 2})).runs) == 2
    monkeypatch.setattr("train.launch.on_gpu", lambda options: True)
    assert grid._fitting(read_study(write_study(tmp_path, data)).runs) == 1


def test_a_commit_is_known_of_what_git_knows_alone(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    tracked, other = tmp_path / "tracked.py", tmp_path / "other.py"
    tracked.write_text("1")
    assert commit_of(tracked) is None
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-qm", "first")
    other.write_text("2")
    assert commit_of(tracked) == git("rev-parse", "--short=12", "HEAD").strip()
    assert commit_of(other) is None
    tracked.write_text("3")
    assert str(commit_of(tracked)).endswith("-dirty")
