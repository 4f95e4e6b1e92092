"""`python -m bench gpu` as far as a machine without a GPU goes: every step in Triton's interpreter, with stand-ins for
the device (rehearsal.py), and whatever may befall a run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.backends import needs_triton

from bench import gpu, problems, short_run
from bench.gpu import goals, rehearsal, steps
from bench.gpu.plan import Step
from bench.gpu.run import NO_TIME, Run
from bench.short_run import Failed, Worker
from softclip_kernels import softclip_loss

# Every way a test can end, for two processes: the first takes each other one.
SUITE = """
import os, time, pytest
def test_passes(): pass
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason="no such thing")
def test_is_skipped(): pass
def test_ends_its_process(): os._exit(7)
def test_loses_the_context():
    os.environ["LOST"] = "1"
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.parametrize("case", ("with a space", "b"))
def test_comes_later(case): assert "LOST" not in os.environ
def test_hangs(): time.sleep(1000)
"""
NVIDIA_SMI = """#!/bin/sh
case "$1" in
  *driver_version*) echo "580.1, 1980 MHz, 2619 MHz, 700.00 W" ;;
  *) echo "1755 MHz, 2619 MHz, 650.10 W, 61" ;;
esac
"""


def _run(*command, **environment):
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def _rows(folder):
    """Of the one record in a folder of results."""
    (path,) = (folder / "gpu").glob("*.json")
    return json.loads(path.read_text())["rows"]


@needs_triton
def test_a_rehearsal_takes_every_step(tmp_path):
    suite, smi, results = tmp_path / "test_suite.py", tmp_path / "nvidia-smi", tmp_path / "results"
    suite.write_text("def test_passes(): pass\n")
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)
    options = ("--rounds", 2, "--minutes", 60, "--suite", suite, "--results", results)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": path, "SOFTCLIP_COMMIT": "0123456789ab", "GIT_DIR": str(tmp_path), "TRITON_INTERPRET": "1"}
    done = _run("-m", "bench", "gpu", "--rehearse", *options, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (results / "gpu").glob("*.json")
    (run,) = json.loads(record.read_text())["runs"].values()
    assert run["commit"] == "0123456789ab" and run["modified"] is None
    rows = {}
    for row in _rows(results):
        assert row.get("passed") is not False and row.get("outcome") != NO_TIME
        rows.setdefault(row["kind"], []).append(row)
    losses = list(problems.LOSSES)
    assert {kind: len(found) for kind, found in rows.items()} == {
        "device": 1, "smoke": 3, "compilation": 1, "speed": 6, "breakdown": 3, "graph": 2, "tests": 1, "correctness": 3,
        "memory": 4, "compiled": 3, "million": 1, "first call": 1
    }  # fmt: skip
    assert rows["device"][0]["driver_version"] == "580.1"
    assert rows["tests"][0]["outcome"] == "1 passed"
    assert [row["loss"] for row in rows["speed"]] == 2 * losses
    assert all(set(row["phases"]) == set(row["phase goals ms"]) == {"statistics", "G", "products", "rest"}
               for row in rows["breakdown"])  # fmt: skip
    assert rows["compilation"][0]["left out"] == {} and rows["compilation"][0]["outcome"] != "0 candidates"
    assert len(run["sources"]) == 12 and "s of 3600 s; if time is left, 2 more" in done.stdout
    assert all(row["fused"]["median"] > 0 and row["clocks.sm under load"] == 1755 for row in rows["speed"])
    assert {row["checked against"] for row in rows["speed"]} == {"dense float32", "chunked tf32"}
    assert all("over hard" in row for row in rows["speed"] if row["loss"] != "hard")
    for rival in steps.RIVALS["psd_teacher"]:
        assert rows["speed"][-1][f"over {rival}"] > 0
    assert rows["speed"][1][goals.EAGER] == "does not fit"
    assert all(row["share of gemm at equal clock"] == row["share of gemm"] for row in rows["speed"])
    assert all(row["outcome"].startswith("no CUDA graph on a cpu") for row in rows["graph"])
    assert all(row["graph over fused"] > 0 and row[f"graph over {goals.EAGER}"] > 0 for row in rows["graph"])
    assert "over linear_cross_entropy" in rows["graph"][0] and "over linear_cross_entropy" in rows["speed"][0]
    assert rows["compiled"][0][f"over {goals.COMPILED}"] > 0
    assert rows["first call"][0]["first call s"] > 0
    assert rows["million"][0]["outcome"] == "completed"
    assert record.with_suffix(".png").exists()
    for column in ("share of gemm", "over eager autocast", "G ms", "MiB allowed", "second call s"):
        assert column in done.stdout


@needs_triton
def test_without_a_gpu_or_triton_it_says_so(monkeypatch, capsys):
    done = _run("-m", "bench", "gpu")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    bad = _run("-m", "bench", "gpu", "--n", 0)
    assert bad.returncode == 2 and "must be at least 1" in bad.stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2 and "triton is not installed" in capsys.readouterr().err


def test_the_tests_over_processes_lose_nothing(tmp_path, monkeypatch):
    """What ends a process costs the test that did it; a test that hangs is ended, or cut off by the time-out."""
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    monkeypatch.setattr(short_run, "STUCK", 10.0)
    row = short_run.run_tests(suite, 60, processes=2)
    assert row["seconds"] < 50 and not row["passed"]
    assert row["outcome"].count(",") == 3
    for part in ("3 passed", "1 skipped", "2 failed", "2 not finished"):
        assert part in row["outcome"]
    failures = {failure["test"].split("::")[1]: failure for failure in row["failures"]}
    assert sorted(failures) == ["test_ends_its_process", "test_fails", "test_hangs", "test_loses_the_context"]
    assert "assert 1 == 2" in failures["test_fails"]["message"]
    assert row["skipped"] == {"Skipped: no such thing": 1}
    monkeypatch.setattr(short_run, "STUCK", 90.0)
    suite.write_text("import time\ndef test_one(): pass\ndef test_two(): time.sleep(1000)\n")
    row = short_run.run_tests(suite, 4, 1)
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
    row = short_run.run_tests(suite, 60, 1)
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


def _threads():
    return {"threads": torch.get_num_threads()}


def test_a_workers_environment_is_there_before_torch(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    worker = Worker(environment={"OMP_NUM_THREADS": "1"})
    try:
        assert worker.call(_threads, {}, 60) == {"threads": 1}
    finally:
        worker.end()


def _wrong(**arguments):
    raise AssertionError("dx differs from float32 by 1e+00")


def _told(**arguments):
    return {"told": [f"{name} {getattr(value, 'loss', value)}" for name, value in arguments.items()]}


def _caches(case):
    assert not os.listdir(os.environ["TRITON_CACHE_DIR"])
    caches = {"triton": os.environ["TRITON_CACHE_DIR"], "tiles": os.environ["XDG_CACHE_HOME"]}
    return caches | {"process": os.getpid()}


def test_a_failure_is_recorded_and_the_run_goes_on(tmp_path, capsys):
    """The record after a failed step, the next one, and those without time; psd is not measured against a wrong hard. A
    later run with no time at all leaves what was measured."""
    options = Namespace(minutes=1, results=tmp_path, candidate="")
    run = Run(options, rehearsal.SMALL)
    hard, psd = (problems.Case(loss, torch.float32, 8, 4) for loss in ("hard", "psd"))
    speed = Step("speed", psd, 1, _told, {"with_hard": True})
    run.perform(Step("speed", hard, 1, _wrong, {"with_hard": True}))
    run.perform(speed)
    run.perform(Step("million", hard, 100, _told))
    for kind in ("tests", "compilation"):
        run.perform(Step(kind, None, 100, _told, place="here"))
    rows = _rows(tmp_path)
    failed, told, late, tests, compilation = rows
    assert failed["passed"] is False and "dx differs" in failed["error"] and "_wrong" in failed["details"]
    assert told["told"] == ["with_hard False", "case psd"]
    assert late["outcome"] == "no time left" and "passed" not in late
    for unchecked in (tests, compilation):
        assert unchecked["outcome"] == "no time left" and unchecked["passed"] is False
    assert run.finish() == 1
    assert "FAILED: speed hard float32 8 4; tests; compilation" in capsys.readouterr().out
    options.minutes = 0
    Run(options, rehearsal.SMALL).perform(speed)
    assert _rows(tmp_path) == rows


def _compilation(seconds):
    return {"passed": False, "outcome": "1 failed", "kept from the tuner": ["forward=32x64x32w4s1"]}


def _choices(case):
    from softclip_kernels.backends.triton import tuning
    from softclip_kernels.backends.triton.shapes import Shape

    shapes = (Shape(32, 64, 32, 4, 1), Shape(64, 64, 32, 4, 1))
    device = torch.device("cpu")
    chosen = {
        kind: tuning.choose(kind, "", given, lambda shape: None, 0, device).name
        for kind, given in (("forward", shapes), ("backward", shapes), ("forward ", shapes[:1]))
    }
    return chosen | {"stands in": torch.cuda.Event is rehearsal.Event}


@needs_triton
def test_what_failed_alone_is_kept_from_the_tuner(tmp_path):
    run = Run(Namespace(minutes=1, results=tmp_path, candidate=""), rehearsal.SMALL)
    for step in (Step("a", None, 1, _choices), Step("compilation", None, 1, _compilation, place="here"),
                 Step("b", None, 1, _choices), Step("c", None, 1, _choices, place="fresh")):  # fmt: skip
        run.perform(step)
    before, _, *after = run.rows
    assert before["forward"] == before["backward"] == "32x64x32w4s1" and len(after) == 2
    for row in after:
        assert (row["forward"], row["backward"], row["stands in"]) == ("64x64x32w4s1", "32x64x32w4s1", True)


def _tests(seconds):
    failures = [{"test": "a.py::test_b[c]", "message": "a.py:1: in test_b\nE   assert 1 == 2\nE   more"},
                {"test": "a.py::test_d", "message": "no time left"}]  # fmt: skip
    return {"passed": False, "outcome": "2 failed", "failures": failures, "problems": ["Failed: e\nTraceback"]}


def test_tests_that_fail_are_told_by_name(tmp_path, capsys):
    Run(Namespace(minutes=1, results=tmp_path, candidate=""), rehearsal.SMALL).perform(
        Step("tests", None, 1, _tests, place="here")
    )
    told = capsys.readouterr().out.splitlines()[1:]
    assert told == ["  test_b[c]: E   assert 1 == 2", "  test_d: no time left", "  Failed: e"]


def test_a_fresh_step_has_empty_caches_of_its_own(tmp_path):
    run = Run(Namespace(minutes=1, results=tmp_path, candidate=""), rehearsal.SMALL)
    for _ in range(2):
        run.perform(Step("first call", None, 1, _caches, place="fresh"))
    first, second = ([row[name] for name in ("process", "triton", "tiles")] for row in run.rows)
    assert not set(first) & set(second)
    assert os.environ.get("TRITON_CACHE_DIR") not in first and not Path(first[1]).exists()


def test_a_rival_that_does_not_fit_or_fails_is_no_failure_of_the_library(monkeypatch):
    for name, value in rehearsal.stand_ins().items():
        monkeypatch.setattr(torch.cuda, name, value)

    def raises(error):
        def run():
            raise error

        return run

    assert steps.why_not_timed(lambda: None, rehearsal.FREE - 1) is None
    assert steps.why_not_timed(lambda: pytest.fail("attempted"), rehearsal.FREE) == "does not fit"
    assert steps.why_not_timed(raises(torch.OutOfMemoryError("2 GiB")), 0) == "does not fit"
    assert steps.why_not_timed(raises(RuntimeError("no kernel")), 0) == "failed: RuntimeError: no kernel"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_sampled_rows_of_a_million_are_really_checked(dtype):
    """What the interpreter cannot rehearse: 16 bits. A loss or a gradient that is 3 % off is found."""
    x, y, scale = problems.operands(300, 32, dtype)
    rows, columns = softclip_loss(x, y, scale, reduction="none", backend="chunked")
    dx, dy = torch.autograd.grad(0.5 * (rows.mean() + columns.mean()), (x, y))
    with torch.no_grad():
        steps.check_some_rows(x, y, scale, rows, columns, dx)
        steps.check_some_rows(y, x, scale, columns, rows, dy)
        for wrong in ((1.03 * rows, columns, dx), (rows, columns, 1.03 * dx), (rows, columns + 0.1, dx)):
            with pytest.raises(AssertionError, match="differs from float32"):
                steps.check_some_rows(x, y, scale, *wrong)
