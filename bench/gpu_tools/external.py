"""NVIDIA's own tools, where they are installed: the profiler of one kernel, and the sanitizer's checks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import ROOT, Row
from ..problems import Case
from .once import SMALL

CHECKS = ("memcheck", "racecheck")
SANITIZED = (257, 128)  # N and D: inner, edge and corner tiles; a launch takes the sanitizer's time
WRONG = 9  # the sanitizer's exit code where it found something
# The first launch of a kernel is then the pass's own, and not the tuner's.
UNTUNED = {"SOFTCLIP_AUTOTUNE": "0"}
# A buffer of its own for every tensor, so that the sanitizer sees where it ends.
UNCACHED = UNTUNED | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Pass:
    """A forward and a backward pass in a process of its own, which has `environment` added to this one's; what a tool
    says of it goes to a text in `folder`."""

    case: Case
    folder: Path
    environment: Mapping[str, str]


def ncu(kernel: str, one: Pass, limit: float = 170.0) -> Row:
    """What Nsight Compute says of the first launch of a kernel whose name matches this expression, after `limit`
    seconds at most. The row has the path of the text."""
    options = ("--set", "full", "--clock-control", "none", "-c", "1", "-k", f"regex:{kernel}")
    text = one.folder / f"ncu-{re.sub(r'[^A-Za-z0-9]+', '-', kernel)}-{one.case.loss}.txt"
    command = ("ncu", *options, *_once(one.case))
    found = _observed(command, {**one.environment, **UNTUNED}, text, limit, r"Duration +\S.*|No kernels were profiled")
    return {"kind": "ncu", "kernel": kernel, **one.case.labels(), **found}


def sanitize(check: str, one: Pass, limit: float = 170.0) -> Row:
    """compute-sanitizer's verdict after `limit` seconds at most. Super-blocks are small, so that there are several. The
    text stays where it did not pass."""
    command = ("compute-sanitizer", "--tool", check, "--error-exitcode", str(WRONG), *_once(one.case, SMALL))
    text = one.folder / f"{check}-{one.case.loss}.txt"
    found = _observed(command, {**one.environment, **UNCACHED}, text, limit, r"(ERROR|RACECHECK) SUMMARY.*")
    if found.get("passed"):
        Path(found.pop("text")).unlink()
    return {"kind": "sanitize", "check": check, **one.case.labels(), **found}


def _once(case: Case, *options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "bench.gpu_tools.once", *map(str, case.labels().values()), case.device, *options)


def _observed(command: Sequence[str], environment: Mapping[str, str], text: Path, limit: float, summary: str) -> Row:
    """Whether the tool is there, its exit code, and the last line with its `summary`, else the last one. At the
    limit the process that it looks at ends with it."""
    tool = shutil.which(command[0])
    if tool is None:
        return {"installed": False, "outcome": f"{command[0]} is not installed"}
    text.parent.mkdir(parents=True, exist_ok=True)
    with text.open("w") as output:
        process = subprocess.Popen(
            [tool, *command[1:]],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # no session of its own, which would outlive whoever ends this one
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    said = text.read_text(errors="replace")
    lines = [found.group() for found in re.finditer(summary, said)] or said.strip().splitlines() or ["no output"]
    outcome = "not finished in time" if code is None else lines[-1]
    return {"installed": True, "exit code": code, "passed": code == 0, "outcome": outcome, "text": str(text)}
