"""Peak resident memory, as Linux tells it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

# For the environment of a process: glibc gives what is freed back to the system at once, and what is resident is what
# is alive.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def growth(work: Callable[[], object]) -> int:
    """The bytes by which this process's peak while working exceeds what was resident before."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    kept = work()
    peak = _resident("VmHWM")
    del kept
    return peak - before


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), a function of a module, where nothing has been allocated or freed before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
