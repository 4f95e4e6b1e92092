"""NVIDIA's own tools, where they are installed: the profiler of one kernel, and the sanitizer's checks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .. import ROOT, Row
from ..problems import LOSSES, Case

CHECKS = ("memcheck", "racecheck")
SANITIZED = (257, 128)  # N and D: inner, edge and corner tiles; a launch takes the sanitizer's time
WRONG = 9  # the sanitizer's exit code where it found something
# The first launch of a kernel is then the pass's own, and not the tuner's.
UNTUNED = {"SOFTCLIP_AUTOTUNE": "0"}
# A buffer of its own for every tensor, so that the sanitizer sees where it ends.
UNCACHED = UNTUNED | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def ncu(kernel: str, case: Case, folder: Path, seconds: float = 170.0) -> list[Row]:
    """One row: what Nsight Compute says of the first launch of a kernel whose name matches this expression. All of it
    goes to a text file in `folder`; the row has its path."""
    options = ("--set", "full", "--clock-control", "none", "-c", "1", "-k", f"regex:{kernel}")
    text = folder / f"ncu-{re.sub(r'[^A-Za-z0-9]+', '-', kernel)}.txt"
    row = {"kind": "ncu", "kernel": kernel, **case.labels()}
    return [
        row | _observed(("ncu", *options), case, text, seconds, UNTUNED, r"Duration +\S.*|No kernels were profiled")
    ]


def sanitize(
    folder: Path,
    size: tuple[int, int] = SANITIZED,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seconds: float = 170.0,
) -> list[Row]:
    """A row for every check and loss, `seconds` for all of them: compute-sanitizer's verdict; its text goes to
    `folder`."""
    rows, end = [], time.monotonic() + seconds
    for check in CHECKS:
        for loss in LOSSES:
            case = Case(loss, dtype, *size, device)
            command = ("compute-sanitizer", "--tool", check, "--error-exitcode", str(WRONG))
            text, left = folder / f"{check}-{loss}.txt", end - time.monotonic()
            found = _observed(command, case, text, left, UNCACHED, r"(ERROR|RACECHECK) SUMMARY.*")
            rows.append({"kind": "sanitize", "check": check, **case.labels(), **found})
    return rows


def _observed(
    command: Sequence[str], case: Case, text: Path, seconds: float, environment: Mapping[str, str], summary: str
) -> Row:
    """Whether the tool is there, its exit code, and the last line with its `summary`, of one pass under it."""
    tool = shutil.which(command[0])
    if tool is None:
        return {"installed": False, "outcome": f"{command[0]} is not installed"}
    once = (sys.executable, "-m", "bench.gpu_tools.once", *map(str, case.labels().values()), case.device)
    text.parent.mkdir(parents=True, exist_ok=True)
    with text.open("w") as output:
        try:
            code = subprocess.run(
                [tool, *command[1:], *once],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(seconds, 0.0),
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    said = [found.group() for found in re.finditer(summary, text.read_text(errors="replace"))]
    outcome = "not finished in time" if code is None else said[-1] if said else "no summary"
    return {"installed": True, "exit code": code, "passed": code == 0, "outcome": outcome, "text": str(text)}
