"""Peak resident memory of a loss, measured in an interpreter of its own.

ru_maxrss would not do: a process inherits it over fork and exec, so a child of a grown test process sees no growth.
VmHWM belongs to the address space, which is new at exec, and starts again where a 5 is written to clear_refs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# glibc gives what is freed back to the system at once: what is resident is what is alive.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads of PyTorch's that spin while they wait starve a busy machine


def growth(work: Callable[[], object]) -> int:
    """The bytes by which this process's peak while working exceeds what was resident before."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    kept = work()
    peak = _resident("VmHWM")
    del kept
    return peak - before


def in_a_new_process(function: str, *arguments: Any, plant: str = "", allocator: dict[str, str] = AT_ONCE) -> Any:
    """What `function` of this module returns for these arguments in a new interpreter, one value of JSON. `plant`:
    lines that run first, for a test of the test."""
    lines = [plant, "import json, sys, memory", f"print(json.dumps(memory.{function}(*json.loads(sys.argv[1]))))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, **allocator, **PASSIVE, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loss_growth(
    backend: str, cases: list[tuple[str, str]], sizes: list[int], width: int, threads: int
) -> dict[str, list[int]]:
    """The growth, in bytes, of a loss's forward and backward pass beyond its inputs: "target dtype" to one for each N.
    `cases` are pairs of a name of conftest.ALL_TARGETS and a dtype."""
    import torch
    from conftest import ALL_TARGETS

    from softclip_kernels import softclip_loss

    torch.set_num_threads(threads)

    def measure(name: str, dtype: str, n: int) -> int:
        x, y = (torch.nn.functional.normalize(torch.randn(n, width)).to(getattr(torch, dtype)) for _ in range(2))
        target, scale = ALL_TARGETS[name](n, n), torch.tensor(14.3, requires_grad=True)
        x.requires_grad_(), y.requires_grad_()
        return growth(lambda: softclip_loss(x, y, scale, target, backend=backend).backward())

    for name, dtype in cases:
        measure(name, dtype, sizes[0])  # libraries load, and workspaces that stay have been made
    return {f"{name} {dtype}": [measure(name, dtype, n) for n in sizes] for name, dtype in cases}


def _resident(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
