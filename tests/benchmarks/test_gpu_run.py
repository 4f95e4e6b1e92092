"""`python -m bench gpu` and tests/test_triton_gpu.py as far as a machine without a GPU goes: every step in Triton's
interpreter or with another backend, with stand-ins for the device (bench/rehearsal.py)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import test_triton_gpu
import torch
from conftest import ALL_TARGETS, RECTANGULAR_TARGETS, SQUARE_TARGETS

from bench import common, gpu, gpu_speed, gpu_tests, rehearsal
from bench.gpu_checks import check_some_rows
from bench.gpu_process import Failed, Worker
from softclip_kernels import softclip_loss
from softclip_kernels.testing import dense_loss

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Every way a test can end, for two processes: the first takes each other one.
SUITE = """
import os, time, pytest
def test_passes(): pass
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason="no such thing")
def test_is_skipped(): pass
def test_ends_its_process(): os._exit(7)
def test_loses_the_context(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.parametrize("case", ("with a space", "b"))
def test_comes_later(case): pass
def test_hangs(): time.sleep(1000)
"""
NVIDIA_SMI = """#!/bin/sh
case "$1" in
  *driver_version*) echo "580.1, 1980 MHz, 2619 MHz, 700.00 W" ;;
  *) echo "1755 MHz, 2619 MHz, 650.10 W, 61" ;;
esac
"""


def _bench(*options, interpret, **environment):
    command = [sys.executable, "-m", "bench", "gpu", *map(str, options)]
    environment = {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@needs_triton
def test_a_rehearsal_takes_every_step(tmp_path):
    suite, smi = tmp_path / "test_suite.py", tmp_path / "nvidia-smi"
    suite.write_text("def test_passes(): pass\n")
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)
    options = ("--interpret", "--rounds", 2, "--minutes", 60, "--suite", suite, "--name", "rehearsal")
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": path, "SOFTCLIP_COMMIT": "0123456789ab", "GIT_DIR": str(tmp_path)}
    done = _bench(*options, "--results", tmp_path / "results", interpret="1", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "results" / "rehearsal.json").read_text())
    assert record["environment"]["commit"] == "0123456789ab" and record["environment"]["modified"] is None
    rows = {}
    for row in record["rows"]:
        rows.setdefault(row["kind"], []).append(row)
    losses = list(common.LOSSES)
    assert {kind: len(found) for kind, found in rows.items()} == {
        "device": 1, "correctness": 3, "tests": 1, "speed": 6, "compiled": 3, "memory": 3, "million": 1, "first call": 1
    }  # fmt: skip
    assert not [row for row in record["rows"] if row.get("passed") is False or row.get("outcome") == "no time left"]
    assert rows["device"][0]["driver_version"] == "580.1"
    assert rows["tests"][0]["outcome"] == "1 passed"
    assert [row["loss"] for row in rows["speed"]] == 2 * losses
    assert all(row["fused"]["median"] > 0 and row["clocks.sm under load"] == 1755 for row in rows["speed"])
    assert {row["checked against"] for row in rows["speed"]} == {"dense float32", "chunked tf32"}
    assert all("over hard" in row for row in rows["speed"] if row["loss"] != "hard")
    for rival in gpu_speed.RIVALS["psd_teacher"]:
        assert rows["speed"][-1][f"over {rival}"] > 0
    assert rows["speed"][1][gpu_speed.EAGER] == "does not fit"
    assert rows["compiled"][0][f"over {gpu_speed.COMPILED}"] > 0
    assert rows["first call"][0]["first call s"] > 0
    assert rows["million"][0]["outcome"] == "completed"
    assert (tmp_path / "results" / "rehearsal.png").exists()


@needs_triton
def test_without_a_gpu_or_triton_it_says_so(monkeypatch, capsys):
    done = _bench(interpret="0")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    bad = _bench("--n", 0, interpret="0")
    assert bad.returncode == 2 and "must be at least 1" in bad.stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2 and "triton is not installed" in capsys.readouterr().err


def test_the_tests_over_processes_lose_nothing(tmp_path, monkeypatch):
    """What ends a process costs the test that did it; a test that hangs is ended, or cut off by the time-out."""
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    monkeypatch.setattr(gpu_tests, "STUCK", 10.0)
    row = gpu_tests.run(60, suite, count=2)
    assert row["seconds"] < 50 and not row["passed"]
    assert row["outcome"].count(",") == 3
    for part in ("3 passed", "1 skipped", "2 failed", "2 not finished"):
        assert part in row["outcome"]
    failures = {failure["test"].split("::")[1]: failure for failure in row["failures"]}
    assert sorted(failures) == ["test_ends_its_process", "test_fails", "test_hangs", "test_loses_the_context"]
    assert "assert 1 == 2" in failures["test_fails"]["message"]
    assert row["skipped"] == {"Skipped: no such thing": 1}
    monkeypatch.setattr(gpu_tests, "STUCK", 90.0)
    suite.write_text("import time\ndef test_one(): pass\ndef test_two(): time.sleep(1000)\n")
    row = gpu_tests.run(4, suite, count=1)
    assert row["seconds"] < 30 and not row["passed"] and row["outcome"] == "1 passed, 1 not finished"


@pytest.mark.parametrize(
    ("source", "outcome", "problem"),
    (
        ("import pytest\npytest.skip('no CUDA device', allow_module_level=True)", "no tests", ""),
        ("import pytest\n@pytest.mark.skip(reason='no')\ndef test_one(): pass", "1 skipped", ""),
        ("raise ImportError('gone')", "no tests", "gone"),
    ),
)
def test_no_test_that_ran_is_no_pass(tmp_path, source, outcome, problem):
    suite = tmp_path / "test_suite.py"
    suite.write_text(source)
    row = gpu_tests.run(60, suite, count=1)
    assert not row["passed"] and row["outcome"] == outcome
    assert problem in "".join(row["problems"])


def _step(what):
    if what == "wrong":
        raise AssertionError("dx differs")
    if what == "broken":
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    if what == "dies":
        os._exit(3)
    if what == "hangs":
        time.sleep(1000)
    return {"process": os.getpid()}


def test_a_step_that_fails_leaves_the_others_a_process():
    worker = Worker(rehearsal.install)
    try:
        first = worker.call(_step, {"what": ""}, 60)
        with pytest.raises(Failed, match="AssertionError: dx differs"):
            worker.call(_step, {"what": "wrong"}, 60)
        assert worker.call(_step, {"what": ""}, 60) == first  # a wrong result breaks nothing
        for what, message in (
            ("broken", "illegal memory"),
            ("dies", "exit code 3"),
            ("hangs", "not finished after 1 s"),
        ):
            before = worker.call(_step, {"what": ""}, 60)
            with pytest.raises(Failed, match=message):
                worker.call(_step, {"what": what}, 60 if what != "hangs" else 1)
            assert worker.call(_step, {"what": ""}, 60) != before
    finally:
        worker.end()


def _wrong(**arguments):
    raise AssertionError("dx differs from float32 by 1e+00")


def _told(**arguments):
    return {"told": arguments}


def test_a_failure_is_recorded_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """The record after a failed step, the next one, and one without time; psd is not measured against a wrong hard."""
    monkeypatch.setattr(gpu, "_device_row", lambda: {"kind": "device"})
    options = Namespace(interpret=True, minutes=1, name="run", results=tmp_path)
    run = gpu.Run(options, gpu.REHEARSAL)
    size = {"n": 8, "d": 4}
    arguments = size | {"with_hard": True}
    run.perform(gpu.Step({"kind": "speed", "loss": "hard", **size}, 1, _wrong, arguments))
    run.perform(gpu.Step({"kind": "speed", "loss": "psd", **size}, 1, _told, arguments))
    run.perform(gpu.Step({"kind": "million", "loss": "hard", **size}, 100, _told, arguments))
    run.perform(gpu.Step({"kind": "tests"}, 100, _told, {}, apart=False))
    _, failed, told, late, tests = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert failed["passed"] is False and "dx differs" in failed["error"] and "_wrong" in failed["details"]
    assert told["told"]["with_hard"] is False
    assert late["outcome"] == "no time left" and "passed" not in late
    assert tests["outcome"] == "no time left" and tests["passed"] is False
    assert run.finish() == 1
    assert "FAILED: speed hard 8 4; tests" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_sampled_rows_of_a_million_are_really_checked(dtype):
    """What the interpreter cannot rehearse: 16 bits. A loss or a gradient that is 3 % off is found."""
    x, y, scale = common.operands(300, 32, dtype)
    rows, columns = softclip_loss(x, y, scale, reduction="none", backend="chunked")
    dx, dy = torch.autograd.grad(0.5 * (rows.mean() + columns.mean()), (x, y))
    with torch.no_grad():
        check_some_rows(x, y, scale, rows, columns, dx)
        check_some_rows(y, x, scale, columns, rows, dy)
        for wrong in ((1.03 * rows, columns, dx), (rows, columns, 1.03 * dx), (rows, columns + 0.1, dx)):
            with pytest.raises(AssertionError, match="differs from float32"):
                check_some_rows(x, y, scale, *wrong)


def test_goals_are_those_of_the_issue():
    row = {"share of gemm": 0.75, "over hard": 1.2, "over eager autocast": 6.0, "over compiled autocast": 2.4}
    assert gpu_speed.goals("hard", 32768, 512, row) == {
        "share of gemm >= 0.8": False,
        "over eager autocast >= 5.0": True,
        "over compiled autocast >= 2.5": False,
    }
    assert gpu_speed.goals("psd", 16384, 1024, row) == {"over hard <= 1.15": False}
    assert gpu_speed.goals("psd_teacher", 16384, 512, row) == {"share of gemm >= 0.7": True}
    assert gpu_speed.goals("hard", 4096, 512, row) == {}


def test_the_plan_fits_in_its_time_up_to_the_goals_and_leaves_no_size_out():
    options = Namespace(n=gpu.SIZES, d=gpu.WIDTHS, rounds=7, no_tests=False, no_compile=False, suite=gpu_tests.SUITE)
    steps = list(gpu.plan(options, gpu.GPU))
    kinds = [step.labels["kind"] for step in steps]
    others = kinds.index("first call") + 1
    assert sum(step.estimate for step in steps[:others]) < 60 * 8.5
    timed = [
        (step.labels["loss"], step.labels["n"], step.labels["d"]) for step in steps if step.labels["kind"] == "speed"
    ]
    assert len(timed) == len(set(timed)) == 3 * len(gpu.SIZES) * len(gpu.WIDTHS)


@pytest.mark.parametrize("name", ALL_TARGETS)
def test_targets_and_losses_stay_on_their_device(name, monkeypatch):
    """The meta device stands for CUDA: like it, it takes no tensor of the CPU with one dimension or more. Targets are
    moved as the GPU tests move them."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: contextlib.nullcontext())  # meta has none
    n = 6
    target = test_triton_gpu.moved(ALL_TARGETS[name](n, n), "meta")
    x, y = (torch.empty(n, 5, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scale = torch.empty((), device="meta", requires_grad=True)
    for loss in (dense_loss(x, y, scale, target), softclip_loss(x, y, scale, target)):
        gradients = torch.autograd.grad(loss, (x, y, scale))
        assert [one.device.type for one in (loss, *gradients)] == ["meta"] * 4


@pytest.fixture
def on_a_processor(monkeypatch):
    for name, value in vars(_Small).items():
        if name.isupper():
            monkeypatch.setattr(test_triton_gpu, name, value)
    for name, value in rehearsal.stand_ins().items():
        monkeypatch.setattr(torch.cuda, name, value)


class _Small:
    DEVICE, BACKEND = "cpu", "chunked"
    SQUARE_SIZES, RECTANGULAR_SIZES = ((1, 3), (50, 8)), ((1, 4, 8), (50, 30, 8))
    SCALED, SUPER_BLOCKS, ADVERSARIAL, REPEATED, MEMORY = (50, 8), (60, 8), (50, 8), (50, 8), (40, 8)
    MUTATED = (129, 40)
    REPEATS = 2


@pytest.mark.parametrize("dtype", test_triton_gpu.DTYPES)
def test_the_gpu_tests_run_through_on_a_processor(on_a_processor, dtype):
    """With small sizes and the chunked backend, which takes the same dtypes."""
    for name in SQUARE_TARGETS:
        test_triton_gpu.test_square_targets(name, dtype)
    for name in RECTANGULAR_TARGETS:
        test_triton_gpu.test_rectangular_targets(name, dtype)
    test_triton_gpu.test_scales("psd_block", 300.0, dtype)
    test_triton_gpu.test_super_blocks("psd", dtype)
    test_triton_gpu.test_every_mutant_is_refused("psd_external", dtype)
    for case in ("huge", "identical", "opposite", "zero row"):
        test_triton_gpu.test_adversarial_values(case, dtype)
    test_triton_gpu.test_ranks(dtype)
    for name in ("hard", "labels", "groups"):
        test_triton_gpu.test_repeats_are_bitwise_equal(name)
    test_triton_gpu.test_memory_beyond_inputs_and_gradients("psd")
    test_triton_gpu.check_last_rows(100, 32)
