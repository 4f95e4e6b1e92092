"""Peak resident memory, as Linux tells it."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

# For the environment of a process: glibc gives what is freed back to the system at once, and what is resident is what
# is alive.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def growth(work: Callable[[], object]) -> int:
    """The bytes by which this process's peak while working exceeds what was resident before."""
    before = resident("VmRSS")
    restart_peak()
    kept = work()
    peak = resident("VmHWM")
    del kept
    return peak - before


def restart_peak() -> None:
    """The high-water mark of resident memory starts again here."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """What glibc keeps of freed memory goes to the system: what is resident is what is alive."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), a function of a module, where nothing has been allocated or freed before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def available() -> int:
    """Bytes that could be had on this machine now."""
    return _bytes("/proc/meminfo", "MemAvailable")


def resident(field: str) -> int:
    """Bytes of this process, as /proc/self/status calls them."""
    return _bytes("/proc/self/status", field)


def _bytes(file: str, field: str) -> int:
    lines = Path(file).read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
