"""`python -m bench`: what it lists, and the CPU's commands at sizes that take no time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from helpers import ROOT
from helpers.backends import needs_cpu_kernels

from bench import cpu, problems, records, two_pass
from bench.__main__ import COMMANDS


def test_without_a_command_it_lists_them():
    for arguments in ([], ["no-such"]):
        done = subprocess.run(
            [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 1 and not done.stdout
        _, *lines = done.stderr.splitlines()
        assert [line.split()[0] for line in lines][: len(COMMANDS)] == list(COMMANDS)
        assert all(len(line) < 120 for line in lines) and ("not 'no-such'" in lines) == bool(arguments)


def test_every_command_is_a_module():
    for command in COMMANDS:
        assert importlib.util.find_spec(f"bench.{command}") is not None


def _labels(rows):
    """What tells the rows of each table apart."""
    return {(row["table"], *(label for label in cpu.LABELS if label in row)) for row in rows}


@needs_cpu_kernels
def test_the_tables_of_the_cpu_have_rows(tmp_path, monkeypatch):
    """With the labels of those in the tree, so that a run takes their place."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    tables = ["speed", "frozen", "peak", "growth"]
    cpu.main(["--n", "65", "--d", "32", "--rounds", "1", "--only", *tables])
    (path,) = (tmp_path / "cpu").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [sum(row["table"] == name for row in rows) for name in tables] == [16, 4, 24, 2]
    frozen = [row for row in rows if row["table"] == "frozen"]
    assert [(row["dtype"], row["pass"]) for row in frozen] == [
        (dtype, f"frozen {side}") for dtype in ("float32", "bfloat16") for side in "xy"
    ]
    assert all(row["of both"] > 0 for row in frozen)
    hard = [row for row in rows if row["table"] == "speed" and row["loss"] == "hard"]
    assert len(hard) == 8 and all(row["over linear_cross_entropy"] > 0 for row in hard)
    paths = (ROOT / "bench" / "results" / "cpu").glob("*.json")
    kept = [row for path in paths for row in json.loads(path.read_text())["rows"]]
    assert _labels(rows) - _labels(kept) <= _labels(frozen)


@needs_cpu_kernels
@pytest.mark.parametrize("side", ("x", "y"))
def test_a_frozen_tower_that_spoils_the_other_gradient_is_not_timed(side, monkeypatch):
    fused = problems.fused

    def wrong(*arguments):
        def loss(x, y, scale):
            spoilt = not (x if side == "x" else y).requires_grad
            return fused(*arguments)(x, y, scale) * (1.05 if spoilt else 1.0)

        return loss

    monkeypatch.setattr(problems, "fused", wrong)
    with pytest.raises(AssertionError, match=f"frozen {side} against dense: d{'y' if side == 'x' else 'x'}"):
        cpu.frozen(65, 32, 1)


def test_two_passes_have_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    two_pass.main(["--batch", "64", "--width", "16", "--layers", "2", "--micro-batches", "2", "--rounds", "1"])
    (path,) = (tmp_path / "two_pass").glob("*.json")
    plain, two = json.loads(path.read_text())["rows"]
    assert (plain["micro-batches"], two["micro-batches"]) == (two_pass.PLAIN, 2)
    assert plain["of plain time"] == 1 and two["of plain time"] > 0 and two["peak MiB"] > 0


def test_a_wrong_second_pass_is_not_timed():
    right = two_pass.step(64, 16, 2, two_pass.PLAIN)
    with pytest.raises(AssertionError, match="2 micro-batches: gradient 0 is off by"):
        two_pass.check({"0": right, "2": lambda: [1.01 * gradient for gradient in right()]})
