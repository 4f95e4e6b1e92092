"""What the package needs to be imported, and what it says about what it can run."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from softclip_kernels import backends, info, softclip_loss
from softclip_kernels.testing import unit_rows


def python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return run.stdout


def test_import_needs_no_triton_and_no_build():
    """Where triton and the CPU extension cannot be imported, the loss still works, and the report says why not."""
    blocked = """
import sys
sys.modules["triton"] = None
sys.modules["softclip_kernels._cpu"] = None
import torch, softclip_kernels, softclip_kernels.info as info
x = torch.eye(3)
assert softclip_kernels.softclip_loss(x, x, torch.ones(())).isfinite()
import json
print(json.dumps(info.report()))
"""
    report = json.loads(python(blocked))
    assert report["auto"]["cpu"]["float32"] == "chunked"
    for name in {"cpu", "triton"} & set(report["backends"]):
        assert all(report["backends"][name]["why_not"]["cpu"].values()), name


def test_import_touches_nothing_heavy():
    """Importing the package imports neither triton nor the trainer's packages, and starts no CUDA context."""
    code = """
import sys, torch
before = set(sys.modules)
import softclip_kernels
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & {"triton", "deepspeed", "train", "bench"}))
print(torch.cuda.is_initialized())
"""
    assert python(code).split() == ["[]", "False"]


def test_report_covers_every_backend():
    report = info.report()
    assert list(report["backends"]) == list(backends.registered())
    assert set(report["auto"]["cpu"]) == {"float32", "bfloat16", "float16", "float64"}
    command = [sys.executable, "-m", "softclip_kernels.info"]
    text, as_json = (
        subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
        for options in ([], ["--json"])
    )
    assert json.loads(as_json)["versions"]["torch"] == torch.__version__
    assert all(f"backend {name}" in text for name in backends.registered())


def test_the_choice_is_logged_once_with_its_reason(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_announced", set())
    x = unit_rows(4, 3, dtype=torch.float16)
    with caplog.at_level(logging.INFO, "softclip_kernels"):
        for _ in range(3):
            softclip_loss(x, x, torch.ones(()))
    (record,) = [record.getMessage() for record in caplog.records if "chosen" in record.getMessage()]
    assert re.match(r"backend chunked chosen \(.+\)", record)


def test_a_backend_asked_for_never_falls_back(monkeypatch):
    monkeypatch.setattr(backends.registered()["chunked"], "why_not", lambda problem: "of a test", raising=False)
    x = unit_rows(4, 3)
    with pytest.raises(RuntimeError, match="backend='chunked' cannot compute this: of a test"):
        softclip_loss(x, x, torch.ones(()), backend="chunked")


def test_setup_does_not_import_torch():
    """The package is built without torch in the build environment."""
    code = """
import runpy, sys
sys.modules["torch"], sys.argv = None, ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""
    assert re.search(r"\d+\.\d+\.\d+", python(code))
