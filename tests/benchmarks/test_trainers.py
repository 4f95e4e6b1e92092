"""`python -m bench trainers`: every host's loop runs with its loss and with ours, and what goes wrong is a row. Runs
with the hosts that are installed (all of them in .venv-hosts)."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
from torch import nn

from bench import trainers
from bench.installed import missing
from bench.trainers import MEASURED, measure
from bench.trainers.loops import HOST, LOOPS, OURS, STEPS, Loop
from bench.trainers.watch import Watch


def _train(loss, n, steps=STEPS, factor=1.0):
    tower = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(tower.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        output = tower(torch.ones(n, 4))
        held = torch.ones(16 * 2**20 if loss == HOST else 1)
        (factor * output.square().mean() + 0 * held[0]).backward()
        time.sleep(0.02 if loss == HOST else 0.08)
        optimizer.step()


def _right(loss, n, folder):
    _train(loss, n)


def _wrong(loss, n, folder):
    _train(loss, n, factor=1.01 if loss == OURS else 1.0)


def _short(loss, n, folder):
    _train(loss, n, steps=2)


def _raising(loss, n, folder):
    raise RuntimeError("planted\nand more")


def _planted(run, module="torch"):
    return measure(Loop("planted", module, "its own", run), 8, threads=1, rounds=2)


@pytest.mark.parametrize("loop", [pytest.param(loop, id=loop.name) for loop in LOOPS])
def test_every_loop_trains_as_its_host(loop):
    if why := missing(loop.module):
        pytest.skip(why)
    rows = measure(loop, 48, threads=1, rounds=1)
    assert [row["outcome"] for row in rows] == [MEASURED] * len(loop.losses)
    assert all(len(row["step"].seconds) == STEPS - 1 for row in rows)
    assert all(0 < row["peak MiB"] < 100 for row in rows)


def test_steps_and_peaks_are_those_of_the_loss():
    host, ours = _planted(_right)
    assert host["calls"] == "its own" and len(host["step"].seconds) == 2 * (STEPS - 1)
    assert host["step"].median >= 0.02 and ours["step"].median >= 0.08
    assert ours["of the host's"] == pytest.approx(ours["step"].median / host["step"].median)
    assert 60 <= host["peak MiB"] < 96 and ours["peak MiB"] < 32


def test_a_step_begins_with_a_module_that_learns():
    """Not with a picture's transform, which torchvision makes a module, too."""
    watching, tower = Watch(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(tower.parameters())
    for _ in range(2):
        for module in (nn.Identity(), tower):
            began = time.perf_counter()
            watching.begin(module)
            time.sleep(0.1)
        last = time.perf_counter() - began
        watching.after_step(optimizer)
    assert 0.1 <= watching.seen.seconds[0] <= last


@pytest.mark.parametrize(
    ("run", "told"),
    (
        (_wrong, "a parameter ends .* from the host's"),
        (_short, f"planted made 2 steps, not {STEPS}"),
        (_raising, "RuntimeError: planted"),
    ),
)
def test_what_goes_wrong_is_a_row_and_not_timed(run, told):
    (row,) = _planted(run)
    assert "step" not in row
    assert re.search(told, row["outcome"])


def test_a_host_that_is_not_there_is_a_row():
    (row,) = _planted(_right, module="no_such_host")
    assert row["outcome"] == "no_such_host is not installed"


def test_the_command_writes_a_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainers, "LOOPS", (Loop("planted", "torch", "its own", _right),))
    trainers.main(["--sizes", "8", "--rounds", "1", "--threads", "1", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("trainers/*.json")
    assert [row["loss"] for row in json.loads(path.read_text())["rows"]] == [HOST, OURS]
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize("arguments", (["--sizes", "0"], ["--rounds", "0"], ["--hosts", "none"]))
def test_wrong_options_are_refused(arguments):
    with pytest.raises(SystemExit):
        trainers.parse(arguments)
