"""What the Triton kernels compile to for GPUs that are not at hand: registers, spills, shared memory, instructions.

python -m bench aot    every variant for every architecture (minutes): the summary of docs/triton.md, and the rows to
                       bench/results/triton_aot/, which git ignores: any machine with triton makes the same

Compiled, not run: it needs triton and no GPU. The budgets that the figures must keep are in
tests/backends/test_triton_aot.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from .. import Row
from ..records import Record

LABELS = ("architecture", "variant", "triton")


def summary(rows: Sequence[Row]) -> list[Row]:
    """A line for every architecture and kernel: how many variants, and the most that one of them takes. `waiting`: how
    many of them have tensor instructions that wait for the one before."""
    lines = []
    for architecture, kernel in dict.fromkeys((row["architecture"], row["kernel"]) for row in rows):
        those = [row for row in rows if (row["architecture"], row["kernel"]) == (architecture, kernel)]
        lines.append(
            {
                "architecture": architecture,
                "kernel": kernel,
                "variants": len(those),
                "registers": max(row["registers"] for row in those),
                "bytes spilled": max(row["spilled"] for row in those),
                "shared KiB": round(max(row["shared"] for row in those) / 1024),
                "of KiB": those[0]["shared_limit"] // 1024,
                "instructions": max(row["instructions"] for row in those),
                "waiting": sum(row.get("serialized", 0) > 0 for row in those),
            }
        )
    return lines


def markdown(lines: Sequence[Row]) -> str:
    """Rows with the same keys as a table of a page."""
    heads = list(lines[0])
    ruler = ["---" if isinstance(value, str) else "--:" for value in lines[0].values()]
    cells = [heads, ruler, *([str(value) for value in line.values()] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main(arguments: Sequence[str]) -> None:
    from . import machine_code, variants  # here, because they import triton

    parser = argparse.ArgumentParser(prog="python -m bench aot", description=__doc__.split("\n\n")[0])
    every_architecture = list(variants.ARCHITECTURES)
    parser.add_argument("--architecture", nargs="+", choices=every_architecture, default=every_architecture)
    parser.add_argument("--every", type=int, default=1, help="compile every n-th variant only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--name", default="triton_aot", help="of the folder in bench/results/")
    options = parser.parse_args(arguments)
    if min(options.every, options.jobs) < 1:
        parser.error(f"--every {options.every} and --jobs {options.jobs} must be at least 1")
    rows = machine_code.table(options.architecture, options.every, jobs=options.jobs)
    print(markdown(summary(rows)))
    record = Record(options.name, "cpu", LABELS)
    record.add(rows)
    print(f"written to {record.path}")
