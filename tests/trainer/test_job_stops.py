"""Whole training jobs of two processes on the CPU that are asked to stop, lose their launcher, meet another job on
their run, take long over what is no hang, or go on with other options.

Each start costs about ten seconds of imports, so that one job serves several checks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.jobs import TIMEOUT, configuration, finish, read_terminal, start, start_in_terminal, steps_logged, wait_for

from train import checkpoint, config, heartbeat, lock
from train.cli import main
from train.signals import INTERRUPTED, STOPPED, Stop

LONG_RUN = 5000  # steps that no test waits for
PROMISE = 10.0  # seconds after which no rank lives on without its launcher


def pids(run: Path) -> list[int]:
    return [place.pid for place in heartbeat.read(run)]


def is_alive(pid: int) -> bool:
    """One that nobody has reaped yet has ended all the same."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def put_a_file_in_place_of(folder: Path) -> None:
    """Of one that is made again whenever it is missing."""
    file = folder.with_name("in the way")
    file.touch()
    while not folder.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            file.rename(folder)


def check_stopped(run: Path, status: int, said: str, name: str) -> int:
    """Ended as promised; returns the steps that are done and kept."""
    assert status == STOPPED, said
    assert "Traceback" not in said, said
    assert "error" not in said, said
    found = checkpoint.find(run)
    done = checkpoint.read_state(found).step
    lines = [line for line in said.splitlines() if "stopped by" in line]
    assert lines == [f"stopped by {name} after step {done - 1}: {found}; go on with --resume {run}"], said
    assert steps_logged(run) == list(range(done)), "the last step of the log is that of the checkpoint"
    return done


# --- The signals


def test_each_signal_stops_the_job_with_a_checkpoint_that_the_next_job_goes_on_from(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, done = tmp_path / "run", 0
    file = configuration(tmp_path, data, steps=LONG_RUN, checkpoint_every=LONG_RUN, evaluate_every=0)

    # To the launcher. Options stand in any order.
    job = start("job.keep_checkpoints=3", "--config", str(file), "data.max_bad_fraction=0.02", "--folder", str(run))
    wait_for(run, 1, lambda place: place.step >= 2)
    # A second job on the run is refused, by name, and disturbs nothing.
    assert main(["--resume", str(run)]) == 2
    assert f"{run} is in use by process {job.pid} on " in capsys.readouterr().err
    job.send_signal(signal.SIGTERM)
    done = check_stopped(run, *finish(job), "SIGTERM")
    assert done >= 3

    # To one rank alone.
    job = start("--resume", str(run))
    place = wait_for(run, 1, lambda place: place.step > done)
    os.kill(place.pid, signal.SIGUSR1)
    status, said = finish(job)
    assert f"steps {done} to {LONG_RUN}" in said
    done = check_stopped(run, status, said, "SIGUSR1")

    # To all, by a terminal that is closed: nothing more can be written to it.
    terminal_job, terminal = start_in_terminal("--resume", str(run))
    shown = [""]
    wait_for(run, 1, lambda place: (shown.append(read_terminal(terminal)), place.step > done)[1])
    os.close(terminal)
    assert terminal_job.wait(TIMEOUT) == STOPPED, "".join(shown)
    assert checkpoint.read_state(checkpoint.find(run)).step > done
    done = checkpoint.read_state(checkpoint.find(run)).step
    assert steps_logged(run) == list(range(done))

    # To all, as by Ctrl-C, while no heartbeat can be written.
    job = start("--resume", str(run))
    wait_for(run, 1, lambda place: place.step > done)
    put_a_file_in_place_of(run / heartbeat.FOLDER)
    time.sleep(2 * heartbeat.BEAT_SECONDS)
    os.killpg(job.pid, signal.SIGINT)
    status, said = finish(job)
    assert said.count("no heartbeat can be written") == 2, said
    done = check_stopped(run, status, said, "SIGINT")
    (run / heartbeat.FOLDER).unlink()

    # And to its end, which is now nearer.
    status, said = finish(start("--resume", str(run), f"optimizer.steps={done + 2}", "job.evaluate_every=1"))
    assert status == 0, said
    assert steps_logged(run) == list(range(done + 2))
    assert "| heldout | 40 |" in said
    kept = config.load(run / "config.yaml")
    assert (kept.optimizer.steps, kept.job.evaluate_every, kept.job.keep_checkpoints) == (done + 2, 1, 3)


def test_before_the_first_step_a_signal_to_one_rank_ends_the_job_with_a_line(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start("--config", str(configuration(tmp_path, data)), "--folder", str(run), fault="stuck_set_up")
    wait_for(run, 0, lambda place: True)
    place = wait_for(run, 1, lambda place: True)
    os.kill(place.pid, signal.SIGTERM)
    status, said = finish(job)
    assert status == STOPPED, said
    assert said == f"stopped by SIGTERM before the first step of this job; go on with --resume {run}\n"
    assert not (run / checkpoint.FOLDER).exists()


def test_who_waits_for_a_request_goes_on_only_after_what_is_done_at_once() -> None:
    """Which ends the process, so that the line of a job that is asked to stop is never there twice."""
    asked, seen = Stop(), []
    asked.act_at_once(lambda name: seen.append((name, asked.wait(0.0))))
    asked._ask(signal.SIGTERM)
    assert seen == [("SIGTERM", False)]
    assert asked.wait(0.0)


def test_a_second_interrupt_ends_the_job_at_once(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start("--config", str(configuration(tmp_path, data)), "--folder", str(run), fault="stuck_saving")
    wait_for(run, 0, lambda place: place.phase == "saving" and place.step == 7)
    ranks = pids(run)
    os.killpg(job.pid, signal.SIGINT)
    time.sleep(1.0)
    assert job.poll() is None, "the first one waits for the checkpoint"
    assert all(map(is_alive, ranks))
    began = time.monotonic()
    os.killpg(job.pid, signal.SIGINT)
    status, said = finish(job)
    assert time.monotonic() - began < PROMISE
    assert status == INTERRUPTED, said
    assert "Traceback" not in said
    assert checkpoint.find(run).name == "step-000004"


def test_ranks_end_within_10_s_of_their_launcher(data: Path, tmp_path: Path) -> None:
    """One of them in a collective, for the other is stuck where nothing else would end it."""
    run = tmp_path / "run"
    job = start("--config", str(configuration(tmp_path, data)), "--folder", str(run), fault="stuck_saving")
    wait_for(run, 0, lambda place: place.phase == "saving" and place.step == 7)
    ranks = pids(run)
    began = time.monotonic()
    job.kill()
    while any(map(is_alive, ranks)) and time.monotonic() - began < 6 * PROMISE:
        time.sleep(0.05)
    took = time.monotonic() - began
    job.communicate()
    assert took < PROMISE
    lock.hold(run).close()  # it is free


# --- Time-outs


def test_a_long_evaluation_and_a_slow_disk_are_no_hang(data: Path, tmp_path: Path) -> None:
    """Longer than the budget of 5 s each. The evaluation at the end is left when asked to, since all steps are kept."""
    run = tmp_path / "run"
    file = configuration(tmp_path, data, steps=1, timeout_seconds=5, evaluate_every=1)
    job = start("--config", str(file), "--folder", str(run), fault="slow_evaluation_and_saving")
    moments = []
    for phase in ("evaluation", "saving", "evaluation"):
        wait_for(run, 1, lambda place: place.phase == phase)  # noqa: B023
        moments.append(time.monotonic())
    job.send_signal(signal.SIGTERM)
    status, said = finish(job)
    assert status == STOPPED, said
    assert (
        f"stopped by SIGTERM in the evaluation at the end; all steps are done and kept; go on with --resume {run}"
        in (said.splitlines())
    )
    assert said.count("stopped by") == 1 and "Traceback" not in said
    assert checkpoint.find(run).name == "step-000001"
    assert moments[1] - moments[0] > 5 and moments[2] - moments[1] > 5, "no test of a budget of 5 s"


@pytest.mark.parametrize(
    ("rank", "writable", "ends"), ((0, True, True), (1, True, True), (0, False, True), (1, False, False))
)
def test_who_ends_the_job_where_nobody_moves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    writable: bool,
    ends: bool,
) -> None:
    """Without heartbeats a rank cannot tell whether rank 0 works for all, which watches itself."""
    ended = threading.Event()
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback", lambda all_threads: None)
    monkeypatch.setattr(heartbeat.os, "_exit", lambda status: ended.set())
    if not writable:
        (tmp_path / heartbeat.FOLDER).touch()
    watch = heartbeat.Heartbeat(tmp_path, rank, SimpleNamespace(timeout_seconds=0.3))  # type: ignore[arg-type]
    watch.enter(4, "evaluation")
    assert ended.wait(60 if ends else 2) is ends
    watch.close()
    said = capsys.readouterr().err
    assert said.count("no heartbeat can be written") == (not writable)
    assert (f"error: rank {rank}, step 4, evaluation: no progress of any rank for " in said) is ends


def test_a_rank_that_hangs_in_set_up_ends_the_job(data: Path, tmp_path: Path) -> None:
    file = configuration(tmp_path, data, setup_timeout_seconds=10)
    status, said = finish(start("--config", str(file), "--folder", str(tmp_path / "run"), fault="stuck_set_up"))
    assert status == 1
    assert ", step 0, set-up: no progress of any rank for " in said
    assert "(job.setup_timeout_seconds=10)" in said
    assert "in open_training_data" in said or "rank 1: step 0, set-up" in said


# --- Other launchers


def test_torchrun_restarts_a_job_that_lost_a_rank_and_hands_signals_on(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    arguments = ("--config", str(configuration(tmp_path, data, steps=LONG_RUN)), "--folder", str(run))
    job = start("--resume", "auto", *arguments, fault="rank_1_killed_once", launcher=launcher)
    wait_for(run, 0, lambda place: place.step >= 10)
    assert steps_logged(run)[:8] == list(range(8)), "from step 4 on for the second time"
    job.send_signal(signal.SIGTERM)
    status, said = finish(job)
    assert status != 0, "torchrun has a status of its own"
    found = checkpoint.find(run)
    done = checkpoint.read_state(found).step
    assert said.count(f"stopped by SIGTERM after step {done - 1}: {found}; go on with --resume {run}") == 1, said
    assert f"steps 4 to {LONG_RUN}" in said
    assert steps_logged(run) == list(range(done))
