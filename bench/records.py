"""Records of measurements: bench/results/<kind>/<machine>.json, one row a line.

A record belongs to one kind of benchmark and one machine, so that no run touches another machine's figures. A run adds
to what is there: a row takes the place of the one with the same labels, every other row stays, and each says which run
measured it. {"kind": ..., "machine": ..., "runs": {run: commit, versions, ...}, "rows": [...]}
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import softclip_kernels

from . import Row
from .timing import Timing

RESULTS = Path(__file__).parent / "results"
CPUINFO = Path("/proc/cpuinfo")


class Record:
    """The record of this machine's runs of one kind.

    kind      of benchmark, such as "cpu"; the folder's name
    device    "cpu" or "cuda": the machine is named after its CPU or its GPU
    labels    the keys that tell rows apart; every other value of a row is a figure
    folder    bench/results/ where None

    Made before anything is measured: a file that is no record ends the program (SystemExit) and is kept as it is.
    """

    def __init__(self, kind: str, device: str, labels: Sequence[str], folder: Path | None = None) -> None:
        self.machine = machine(device)
        self._kind, self._labels = kind, tuple(labels)
        slug = re.sub(r"[^a-z0-9]+", "-", self.machine.lower()).strip("-")
        self.path = (RESULTS if folder is None else folder) / kind / f"{slug}.json"
        self.environment = environment()
        self._run = f"{self.environment['time']} {self.environment['commit']}"
        self._read()

    def add(self, rows: Iterable[Mapping[str, Any]], replace: bool = True) -> None:
        """Write these rows down as measured by this run. With `replace=False` a row that is there already stays. The
        file is whole at every moment, and is read again first: another run may have written meanwhile."""
        runs, old = self._read()
        merged = {self._identity(row): row for row in old}
        for row in rows:
            identity = self._identity(row)
            if replace or identity not in merged:
                merged[identity] = _plain(row) | {"run": self._run}
        used = {row["run"] for row in merged.values()}
        known = runs | {self._run: self.environment}
        lines = [f' "kind": {json.dumps(self._kind)}', f' "machine": {json.dumps(self.machine)}']
        lines.append(
            ' "runs": {\n' + ",\n".join(f"  {_pair(run, known[run])}" for run in known if run in used) + "\n }"
        )
        lines.append(' "rows": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in merged.values()) + "\n ]")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".json.partial")
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        partial.replace(self.path)

    def _identity(self, row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        return tuple((label, str(row[label])) for label in self._labels if row.get(label) is not None)

    def _read(self) -> tuple[dict[str, Row], list[Row]]:
        if not self.path.exists():
            return {}, []
        try:
            found = json.loads(self.path.read_text())
            runs, rows = found["runs"], found["rows"]
            if (found["kind"], found["machine"]) != (self._kind, self.machine):
                raise ValueError(f"it is of {found['kind']} on {found['machine']}")
            if not {row["run"] for row in rows} <= set(runs):
                raise ValueError("it has rows of runs that it does not know")
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SystemExit(
                f"{self.path} is not a record of {self._kind} on {self.machine} ({reason}); it was left as it is: "
                "mend it or move it away"
            ) from None
        return runs, rows


def _pair(key: str, value: Any) -> str:
    return f"{json.dumps(key)}: {json.dumps(value)}"


def _plain(value: Any) -> Any:
    """For JSON: a Timing becomes its fields, and a number keeps six digits; those behind are noise."""
    if isinstance(value, Timing):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def environment() -> dict[str, Any]:
    """What a figure depends on beside the machine: the time, the commit, whether the tree differed from it, the
    package's sources, threads and versions. SOFTCLIP_COMMIT names the commit of a copy (on a machine lent for a run),
    whose .git is missing or of another commit, and which cannot tell whether it was modified (None)."""
    given = os.environ.get("SOFTCLIP_COMMIT")
    status = None if given else _git("status", "--porcelain", "--untracked-files=no")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": given or _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "modified": None if status is None else bool(status),
        "sources": sources(Path(softclip_kernels.__file__).parent),
        "threads": torch.get_num_threads(),
        "versions": {
            "softclip_kernels": softclip_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def sources(package: Path) -> str:
    """A hash of the package's Python files: which code ran, where no commit or a modified one says it."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@functools.cache  # so that a device that is lost later still has its name in the record
def machine(device: str) -> str:
    """The GPU's name, or the CPU's and the number of CPUs. On x86 with family and model: virtual machines call every
    generation "AMD EPYC"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = said.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in said:
        name += f" (family {said['cpu family']}, model {said.get('model', 'unknown')})"
    return f"{name}, {os.cpu_count()} CPUs"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text, a column for every key of any of them."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, *([_cell(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
