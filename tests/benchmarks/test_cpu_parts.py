"""The table `parts` of `python -m bench cpu`: the stopwatch of the CPU kernels."""

from __future__ import annotations

import json
import time

import pytest
import torch
from helpers.backends import needs_cpu_kernels

from bench import cpu as table
from bench import records
from bench.problems import Case
from softclip_kernels import softclip_loss
from softclip_kernels.backends import cpu
from softclip_kernels.testing import operands

pytestmark = needs_cpu_kernels

N, D = 700, 64


@pytest.fixture
def leaves():
    return tuple(leaf.requires_grad_() for leaf in operands(N, N, D, dtype=torch.float32))


def test_parts_add_up_to_the_calls(leaves, monkeypatch):
    """On one thread: of every part there is some, and the call takes longer than all of them. What each took in the
    best of some calls, for another process may take the core in the middle of one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    best = {each: dict.fromkeys(cpu.PARTS, float("inf")) for each in ("forward", "backward")}
    for _ in range(10):
        losses = []
        for name, run in (
            ("forward", lambda: losses.append(softclip_loss(*leaves))),  # noqa: B023
            ("backward", lambda: torch.autograd.grad(losses[0], leaves)),  # noqa: B023
        ):
            start = time.perf_counter()
            found, threads = cpu.parts(run)
            assert sum(found.values()) < time.perf_counter() - start
            assert threads == 1 and tuple(found) == cpu.PARTS and min(found.values()) > 0
            best[name] = {part: min(seconds, found[part]) for part, seconds in best[name].items()}
    forward, backward = best.values()
    assert forward["products"] > 0.3 * sum(forward.values())
    assert forward["passes"] < 0.01 * forward["products"]  # a forward has no gradients
    assert backward["products"] > forward["products"]  # two products for one


def test_nothing_is_measured_when_nobody_asks(leaves):
    cpu.parts(lambda: None)
    softclip_loss(*leaves)
    assert cpu._cpu.stopwatch(False) == ([0.0] * len(cpu.PARTS), 0)


def test_an_error_ends_the_measuring(leaves):
    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        cpu.parts(fail)
    softclip_loss(*leaves)
    assert cpu._cpu.stopwatch(False) == ([0.0] * len(cpu.PARTS), 0)


def test_the_table_has_a_row_for_each_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(table.parts_table, "LONG_ENOUGH", 0.001)
    table.main(["--only", "parts", "--sizes", "64", "--d", str(D), "--rounds", "1", "--threads", "1"])
    (path,) = (tmp_path / "cpu").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    cases = [Case(loss, dtype, 64, D).labels() for loss in ("hard", "psd") for dtype in (torch.float32, torch.bfloat16)]
    assert [(row["loss"], row["dtype"], row["pass"]) for row in rows] == [
        (case["loss"], case["dtype"], each) for case in cases for each in ("forward", "backward")
    ]
    for row in rows:
        assert sum(row[part] for part in cpu.PARTS) == pytest.approx(1, abs=1e-4)
        assert (
            row["ms"] > 0
            and row["working"] == 1
            and row["share"] == pytest.approx(row["GFLOP/s"] / row["peak GFLOP/s"], rel=1e-3)
        )
