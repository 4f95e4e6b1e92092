"""The tools for tuning as flags of `python -m bench gpu`: what they are told, their time, their tables and record."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from itertools import product

import pytest
from helpers.backends import needs_triton

from bench import gpu
from bench.gpu import rehearsal, tools
from bench.gpu.compilation import FORCED
from bench.gpu.run import NO_TIME
from bench.gpu_tools.external import CHECKS
from bench.problems import LOSSES


def _tooled(tmp_path, *arguments, **changes):
    """The exit code of some tools, with small sizes, and their rows in the record."""
    scale = dataclasses.replace(rehearsal.SMALL, seconds=0.0, **changes)
    code = tools.run_tools(gpu.parse([*arguments, "--results", str(tmp_path)], scale), scale)
    (path,) = (tmp_path / "gpu_tools").glob("*.json")
    return code, json.loads(path.read_text())["rows"]


@needs_triton
def test_tools_have_tables_and_a_record_of_their_own(tmp_path, capsys):
    code, rows = _tooled(tmp_path, "--probe", "--breakdown")
    assert code == 0 and not (tmp_path / "gpu").exists()
    assert {row["loss"] for row in rows if row["kind"] == "breakdown"} == set(LOSSES)
    assert len({row["what"] for row in rows if row["kind"] == "probe"}) == len(rows) - 3 > 0
    assert "statistics ms" in capsys.readouterr().out


def test_a_tool_that_fails_is_a_row(tmp_path, monkeypatch):
    code, rows = _tooled(tmp_path, "--breakdown", prepare=None, first=(2**40, 2**40))
    assert code == 1 and len(rows) == 3 and all(row["passed"] is False and row["error"] for row in rows)


def test_what_starts_processes_is_told_what_the_flags_say(tmp_path, monkeypatch):
    told = {}

    def tell(name):
        return lambda **arguments: told.setdefault(name, []).append(arguments) or {}

    monkeypatch.setattr(tools.external, "ncu", tell("ncu"))
    monkeypatch.setattr(tools.external, "sanitize", tell("sanitize"))
    monkeypatch.setattr(tools.ab, "ab", tell("ab"))
    code, _ = _tooled(tmp_path, "--ncu", "softmax.*", "--sanitize", "--ab", "64x64x64w4s2", f"old={tmp_path}")
    assert code == 0
    ncu, sanitize, first = (told[name][0] for name in ("ncu", "sanitize", "ab"))
    assert ncu["kernel"] == "softmax.*" and ncu["one"].folder == sanitize["one"].folder == tmp_path / "gpu_tools"
    assert [(one["check"], one["one"].case.loss) for one in told["sanitize"]] == [*product(CHECKS, LOSSES)]
    assert [one["one"].case.loss for one in told["ncu"]] == [one["case"].loss for one in told["ab"]] == [*LOSSES]
    environment = rehearsal.SMALL.environment
    assert first["base"].environment == {**environment, "SOFTCLIP_CANDIDATE": "64x64x64w4s2"}
    assert first["against"].path == tmp_path
    assert ncu["one"].environment == sanitize["one"].environment == first["against"].environment == environment
    limit = rehearsal.SMALL.patience * tools.SECONDS
    assert all(0.9 * limit < one["limit"] <= limit for calls in told.values() for one in calls)


def test_the_sanitizer_looks_at_the_cuda_kernels_too(tmp_path, monkeypatch):
    """Where they can run, after Triton's, with texts of their own; a candidate that is asked for comes alone."""
    told = []

    def sanitize(check, one, limit):
        told.append(one)
        return {"check": check, **one.case.labels(), "passed": True}

    monkeypatch.setattr(tools.external, "sanitize", sanitize)
    monkeypatch.setattr(tools, "_has_cuda_kernels", lambda device: True)
    code, rows = _tooled(tmp_path / "all", "--sanitize")
    half = len(CHECKS) * len(LOSSES)
    assert code == 0 and [row.get("candidate") for row in rows] == [None] * half + ["sm90"] * half
    assert [one.environment.get(FORCED) for one in told] == [None] * half + ["sm90"] * half
    assert {one.folder for one in told[:half]} != {one.folder for one in told[half:]}
    told.clear()
    _tooled(tmp_path / "one", "--sanitize", "--candidate", "64x64x64w4s2")
    assert [one.environment[FORCED] for one in told] == ["64x64x64w4s2"] * half


@pytest.mark.parametrize("name", ("ncu", "sanitize"))
def test_a_rehearsal_interprets_what_nvidias_programs_look_at(tmp_path, monkeypatch, name):
    stand_in = tmp_path / ("ncu" if name == "ncu" else "compute-sanitizer")
    stand_in.write_text(f'#!/bin/sh\nwhile [ "$1" != "{sys.executable}" ]; do shift; done\n"$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tools, "LOSSES", ("hard",))
    code, rows = _tooled(tmp_path, f"--{name}", *(["softmax"] if name == "ncu" else []))
    assert code == 0 and all(row["outcome"].startswith("loss ") for row in rows) and rows


def _breakdown(case, seconds):
    if case.loss == "psd":
        time.sleep(1000)
    return {"kind": "breakdown", **case.labels(), "n and d": [case.n, case.d], "forced": os.environ.get(FORCED)}


def test_a_flag_as_a_whole_ends_in_its_time(tmp_path, monkeypatch):
    """What has a figure keeps it, what hangs is ended, and what comes later is told to have had no time."""
    monkeypatch.setattr(tools.breakdown, "breakdown", _breakdown)
    monkeypatch.setattr(tools, "SECONDS", 20.0)
    start = time.monotonic()
    code, (done, ended, late) = _tooled(tmp_path, "--breakdown", patience=1.0)
    assert code == 1 and time.monotonic() - start < 40
    assert (done["loss"], done["n and d"]) == ("hard", [64, 32])
    assert ended["loss"] == "psd" and ended["error"].startswith("not finished after") and ended["passed"] is False
    assert late["loss"] == "psd_teacher" and late["outcome"] == NO_TIME and "passed" not in late


def test_a_tool_looks_at_the_sizes_and_the_candidate_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tools.breakdown, "breakdown", _breakdown)
    monkeypatch.setattr(tools, "LOSSES", ("hard",))
    _, rows = _tooled(tmp_path, "--breakdown", "--n", "40", "50", "--d", "8", "--candidate", "32x64x32w4s1")
    assert [row["n and d"] for row in rows] == [[40, 8], [50, 8]]
    assert all(row["forced"] == row["candidate"] == "32x64x32w4s1" for row in rows)
    _, (row,) = _tooled(tmp_path / "other", "--breakdown", "--n", "50")
    assert row["n and d"] == [50, 32] and row["forced"] is None and "candidate" not in row


def test_a_candidate_is_refused_where_it_means_nothing(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--kernels", "--breakdown", "--candidate", "32x64x32w4s1"], rehearsal.SMALL)
    assert "--candidate means nothing to --kernels\n" in capsys.readouterr().err


def test_a_breakdown_shows_its_longest_kernels():
    kernels = {f"kernel {index}": [1.0, 100.0 - index] for index in range(20)}
    row = {"kind": "breakdown", "wall ms": 1.0, "phases": {"G": 0.5}, "kernels": kernels}
    shown = tools._tables([row])
    assert "G ms" in shown and "kernel 11" in shown and "kernel 12" not in shown
