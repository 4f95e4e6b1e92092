"""How many CPU threads a rank computes with: as many as were asked for, else an equal share of what the job may use.

Too many cost more than too few: two runs that each start a thread for every core wait for one another's time slices,
and were measured 20 to 30 times slower than alone, where 2 is due.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

VARIABLE = "OMP_NUM_THREADS"
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"
CGROUPS = Path("/sys/fs/cgroup")


def threads_of(asked: int | None, ranks_here: int) -> int:
    """Of each of `ranks_here` ranks on this machine; `asked` is job.threads."""
    return asked or _persons() or max(cpu_count() // ranks_here, 1)


def _persons() -> int | None:
    """What a person set in OMP_NUM_THREADS. torchrun sets 1 where nobody did, and nothing tells that 1 from another, so
    under torchrun it counts as nobody's: whoever wants one thread there says job.threads=1."""
    value = os.environ.get(VARIABLE, "").split(",")[0].strip()
    if not value.isdigit() or (value == "1" and UNDER_TORCHRUN in os.environ):
        return None
    return int(value) or None


def cpu_count(groups: str | None = None, mount: Path = CGROUPS) -> int:
    """The cores this process may use: those it may run on, or fewer where a control group, such as a container's,
    limits its time. Python 3.13's own function does not know such limits; joblib's does, for the outermost group, and
    would be a dependency for these lines. `groups`: the contents of /proc/self/cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = (Path("/proc/self/cgroup").read_text() if groups is None else groups).splitlines()
    except OSError:  # no Linux
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names: tuple[str, ...]
        if controllers == "":  # version 2
            root, names = mount, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            root, names = mount / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        # A limit of any group around it holds. In a container the path may be the host's, and the root is its own.
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root):
                cores = min(cores, _limit(folder, names) or cores)
    return cores


def _limit(folder: Path, names: tuple[str, ...]) -> int | None:
    """In cores, rounded up; None where there is none."""
    try:
        quota, period = (int(word) for name in names for word in (folder / name).read_text().split())
    except (OSError, ValueError):  # no such file, or no limit: the word "max"
        return None
    return math.ceil(quota / period) if quota > 0 and period > 0 else None
