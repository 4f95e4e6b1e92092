"""A function of the tests in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
