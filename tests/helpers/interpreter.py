"""A function, or a file of tests, in an interpreter of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import PYTHONPATH, ROOT

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads of PyTorch's that spin while they wait starve a busy machine


def result_of(module: str, function: str, *arguments: Any, plant: str = "", **environment: str) -> Any:
    """What `function` of the module returns for these arguments, one value of JSON, as are the arguments. `plant`:
    lines that run first, for a test of the test."""
    call = f"print(json.dumps({module}.{function}(*json.loads(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join((plant, f"import json, sys, {module}", call)), json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, **PASSIVE, **environment, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_kernels_pass(file: Path, least: int, *options: str) -> None:
    """Tests that interpret Triton's kernels pass, so many at least, and none is skipped; in a process of their own,
    because one either compiles or interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file), *options]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least and "skipped" not in done.stdout
