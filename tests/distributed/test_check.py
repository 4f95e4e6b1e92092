"""`python -m softclip_kernels.check`: its exit status, its report, and what it takes for a loss."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.distributed as dist
from helpers import PYTHONPATH, ROOT

from softclip_kernels import check
from softclip_kernels.testing import dense_loss


def run(*arguments, launcher=()):
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "softclip_kernels.check", *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_it_starts_two_processes_and_finds_softclip_loss_exact():
    status, said, _ = run("--uneven")
    assert status == check.EXACT and said.startswith("exact (2 ranks of 8 + 9 samples, tolerance 0.0001)")


def test_it_names_what_is_wrong_with_anyones_loss():
    status, said, _ = run("--loss", "helpers.planted:multiplied", "--options", '{"factor": 0.5}', "--pairs", "4")
    assert status == check.WRONG and said.count("NOT exact") == 1
    assert "\n- averaged once too often: " in said and "(2 ranks of 4 samples" in said


def test_under_torchrun_it_is_one_of_the_ranks():
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    status, said, _ = run("--pairs", "3", launcher=torchrun)
    assert status == 0 and said.count("exact (2 ranks of 3 samples") == 1


def test_under_a_launcher_it_starts_nobody(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        check.main(["--processes", "2"])
    assert "RANK and WORLD_SIZE are set" in capsys.readouterr().err


def test_a_loss_that_raises_on_one_rank_fails_with_its_message():
    status, said, errors = run("--loss", "helpers.planted:raises_on_the_last_rank")
    assert status == check.FAILED and said == ""
    assert "rank 1: KeyError: 'caption'" in errors


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Made:
    """As open_clip's ClipLoss asks for the job."""

    def __init__(self, local_loss=False, rank=-1, world_size=-1):
        self.given = (local_loss, rank, world_size)

    def __call__(self, x, y, scale):
        return x.sum()


def a_loss(image_features, text_features, logit_scale, smoothing=0.0):
    return image_features.sum()


NO_LOSS = "a string"


def makes_none(group):
    return None


def test_what_makes_a_loss_is_given_what_it_asks_for(group):
    here = __name__
    assert check.find_loss(f"{here}:Made", {}, group).given == (False, 0, 1)
    assert check.find_loss(f"{here}:Made", {"local_loss": True, "rank": 3}, group).given == (True, 3, 1)
    assert check.find_loss(f"{here}:a_loss", {}, group) is a_loss
    assert check.find_loss("helpers.planted:local", {}, group) is dense_loss
    assert callable(check.find_loss("helpers.planted:multiplied", {"factor": 2.0}, group))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    (
        ("helpers.planted", {}, "must be MODULE:NAME"),
        ("helpers.nowhere:loss", {}, "No module named 'helpers.nowhere'; is it in this folder or installed"),
        ("helpers.planted:nothing", {}, "has no attribute 'nothing'"),
        (f"{__name__}:NO_LOSS", {}, "is a str; it must be a loss, or make one"),
        (f"{__name__}:makes_none", {}, "made a NoneType; it must make a loss"),
        (f"{__name__}:a_loss", {"smoothing": 0.1}, "also needs image_features, logit_scale, text_features"),
        (f"{__name__}:Made", {"flag": 1}, "has no option flag; it takes local_loss, rank, world_size"),
    ),
)
def test_what_is_no_loss_is_refused(group, name, options, words):
    with pytest.raises(ValueError, match=words):
        check.find_loss(name, options, group)


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("--options", "{}", "--pairs", "1"), "--pairs 1: a pair alone has no negatives"),
        (("--processes", "0"), "--processes 0: at least 1"),
        (("--options", '{"a": 1}'), "--options are for a --loss"),
        (("--options", "[1]"), "must be an object of names and values"),
        (("--options", "{"), "Expecting property name"),
    ),
)
def test_arguments_are_refused_before_anything_starts(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        check.main(arguments)
    assert ended.value.code == check.FAILED and words in capsys.readouterr().err
