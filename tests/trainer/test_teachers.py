"""Teachers found, kept in checkpoints, refused, and gone on with."""

from __future__ import annotations

import shutil
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import engines
from helpers.data import shard_of, tiny
from helpers.engines import teachers_of
from helpers.jobs import configuration, finish, start, training_rows
from helpers.ranks import Pool
from helpers.saved_runs import write_checkpoint
from helpers.sources import listed
from helpers.taught import RANKS, config, write_run
from safetensors.torch import load_file

from train import checkpoint
from train.config import Config
from train.data import open_training_data
from train.data.training import Indexed
from train.fingerprint import Fingerprint
from train.options import ConfigError
from train.resume import compare
from train.set_up import check_labels
from train.teachers import ALONE

# --- Checkpoints and refusals


def found(run: Path, engine: bool) -> tuple[bool, str]:
    """Whether the run's one checkpoint can be used, and what is said about it."""
    said: list[str] = []
    try:
        checkpoint.find(run, said.append, engine)
    except checkpoint.CheckpointError:
        return False, said[0]
    return True, ""


@pytest.mark.parametrize(
    ("spoilt", "problem"),
    (
        ("none", "cannot be used (step-000003 lacks ema.safetensors, without which the teacher 'ema' cannot go on)"),
        (checkpoint.EMA_WEIGHTS, "is not finite (NaN or infinity in image.1.bias (ema))"),
    ),
)
def test_a_run_with_a_moving_average_goes_on_from_no_checkpoint_without_one(
    tmp_path: Path, spoilt: str, problem: str
) -> None:
    write_run(tmp_path, spoilt=spoilt, teachers=["ema"])
    assert found(tmp_path, engine=True) == (False, f"checkpoint step-000003 {problem}; trying an older one")
    assert found(tmp_path, engine=False) == (True, "")
    write_run(tmp_path / "whole", teachers=["ema"])
    assert found(tmp_path / "whole", engine=True) == (True, "")


@pytest.mark.parametrize(
    ("then", "now", "words"),
    (
        (("self", "a" * 64), ("self", "b" * 64), "self, aaaaaaaaaaaa then, self, bbbbbbbbbbbb now"),
        ((), ("ema",), "self then, ema now"),
        (("ema",), (), "ema then, self now"),
    ),
)
def test_a_run_does_not_go_on_with_another_teacher(
    tmp_path: Path, then: tuple[str, ...], now: tuple[str, ...], words: str
) -> None:
    folder = write_run(tmp_path, towers=engines.TOWERS)
    written = Fingerprint("data", "code", teachers=then)
    (folder / checkpoint.FINGERPRINT).write_text(written.to_json())
    options = config("1", teachers=["self", "moved/there"])  # where they lie is no matter
    assert ALONE.fingerprint(config("1").loss) == ALONE.fingerprint(config("1", target="hard").loss) == ()
    compare(options, folder, written)
    with pytest.raises(checkpoint.CheckpointError, match=r"loss.teachers=..self., .moved/there.. name") as caught:
        compare(options, folder, Fingerprint("data", "code", teachers=now))
    assert words in str(caught.value)


def _refused(group: Any, every: list[Config]) -> list[str]:
    words = []
    for options in every:
        try:
            teachers_of(group, options, engines.bundle())
        except Exception as error:
            words.append(f"{type(error).__name__}: {error}")
    return words


def test_a_teacher_that_cannot_be_had_is_refused_on_all_ranks_by_name(pool: Pool, tmp_path: Path) -> None:
    write_run(tmp_path / "spoilt", spoilt=checkpoint.WEIGHTS)
    (tmp_path / "empty").mkdir()
    problems = {
        "nowhere": "is no folder",
        "small": "is no folder",
        str(tmp_path / "empty"): "holds no checkpoints, and as one itself is not whole",
        str(tmp_path / "spoilt"): "holds no whole checkpoint",
        str(tmp_path / "spoilt" / "checkpoints" / "step-000003"): "is not finite (NaN or infinity in image.1.bias)",
        engines.RANDOM_TOWERS: "begins with random weights",
        "python:nowhere:towers": "cannot be made",
        "open_clip:": "cannot be made (model.towers='open_clip:'; allowed: ",
    }
    here, there = pool.run(_refused, [config("1", teachers=["self", name]) for name in problems])
    assert len(here) == len(problems)
    for said, other, (name, problem) in zip(here, there, problems.items(), strict=True):
        assert said.startswith(f"ConfigError: loss.teachers: {name!r} ") and problem in said, said
        assert other.startswith(f"ElsewhereError: rank 0: loss.teachers: {name!r}"), other


def test_labels_that_the_data_lack_are_asked_for_in_vain_before_the_first_step(data: Path, training: Indexed) -> None:
    by_label, without = config("1", positives="label"), copy(training)
    check_labels(by_label, training)
    without.source = listed(60)
    check_labels(config("1"), without)
    sections = tiny(data)["data"] | {"source": f"stream:{shard_of(data, 'train')}", "epoch_samples": 40}
    stream = open_training_data(Config.from_dict({"data": sections | {"distinct": "none"}}))
    for unlabelled in (without, stream):
        with pytest.raises(ConfigError, match=r"loss.positives='label', but not every record of data.source='emoji"):
            check_labels(by_label, unlabelled)


# --- Saving


def _saved(group: Any, options: Config, run: Path) -> tuple[bool, str]:
    """Whether the moving average of a checkpoint is this one; and what a save says where it holds a NaN."""
    from train.run import save
    from train.world import World

    made, world = engines.bundle(), World(dist.get_rank(), RANKS, torch.device("cpu"), group)
    teachers = teachers_of(group, options, made)
    engine = engines.start(group, options, made)
    engines.take_step(engine, 0, options, group, teachers)
    state, written = checkpoint.State(1, 0, RANKS, options.job.zero_stage), Fingerprint()
    trainer: Any = SimpleNamespace(log=None, state=state, engine=engine, teachers=teachers, world=world, run=run)
    trainer.config, trainer.bundle, trainer.fingerprint = options, made, written
    save(trainer)
    dist.barrier()
    new = teachers_of(group, options, engines.bundle(seed=1))
    new.resume(checkpoint.find(run, engine=True))
    assert teachers.ema is not None and new.ema is not None
    ours, theirs = new.ema.state_dict(), teachers.ema.state_dict()
    kept = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        teachers.ema.log_scale.fill_(torch.nan)
    try:
        save(trainer)
        words = ""
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    engine.destroy()
    return kept, words


def test_a_checkpoint_keeps_the_moving_average_and_none_that_is_not_finite(pool: Pool, tmp_path: Path) -> None:
    (kept, said), (other, _) = pool.run(_saved, config("3", teachers=["ema"]), tmp_path)
    assert kept and other
    assert said.startswith("NonFiniteError: the checkpoint of step 1 is not written") and "log_scale (ema)" in said


# --- A whole job


def test_a_job_with_teachers_goes_on_bitwise(data: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    """With all kinds of them at once, by a schedule of steps; the frozen one lies elsewhere when the run goes on."""
    write_checkpoint(tmp_path / "teacher", data, files, 5)
    shutil.copytree(tmp_path / "teacher", tmp_path / "moved")
    file = configuration(tmp_path, data, steps=12, keep_checkpoints=3, evaluate_every=0)
    schedule = ["loss.schedule=step", "loss.alpha_milestones=[2, 9]", "loss.alpha_values=[0.0, 0.5, 0.75]"]
    teachers = [f"loss.teachers=[{tmp_path / 'teacher'}, self, ema]", "loss.teacher_weights=[1, 1, 2]"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    status, said = finish(start("--config", str(file), "--folder", str(whole), *schedule, *teachers))
    assert status == 0, said
    assert f"teacher {tmp_path / 'teacher'}: the weights of {tmp_path / 'teacher'}/checkpoints/step-000005, SHA" in said

    shutil.copytree(whole, run)  # as it was after four steps
    for step in (8, 12):
        shutil.rmtree(run / checkpoint.FOLDER / checkpoint.name_of(step))
    status, said = finish(start("--resume", str(run), f"loss.teachers=[{tmp_path / 'moved'}, self, ema]"))
    assert status == 0, said
    assert "steps 4 to 12" in said
    assert training_rows(run) == training_rows(whole)
    assert [row["alpha"] for row in training_rows(run)] == [0.0] * 2 + [0.5] * 7 + [0.75] * 3
    weights, ema = (
        [load_file(checkpoint.find(one) / name) for one in (run, whole)]
        for name in (checkpoint.WEIGHTS, checkpoint.EMA_WEIGHTS)
    )
    for ours, theirs in (weights, ema):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(weights[0]["image.project.weight"], ema[0]["image.project.weight"])
