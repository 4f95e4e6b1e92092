"""The index of a set of shards: 32 bytes a pair, made by one pass over their headers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...threads import cpu_count
from ..record import DataError
from . import index
from .reading import Progress, Stamp
from .scan import ScanError, Suffixes, scan_all

# scan.ENTRY for numpy. Places are in blocks: of the picture from the shard's start, of the others from the picture,
# where 0 says that there is none.
ENTRY = np.dtype(
    [
        ("shard", "<u4"),
        ("image", "<u4"),
        ("image_size", "<u4"),
        ("text", "<i4"),
        ("text_size", "<u4"),
        ("json", "<i4"),
        ("json_size", "<u4"),
        ("cls", "<i4"),
    ]
)
MAX_PROCESSES = 16  # that scan together; disks give no more

Known = dict[tuple[str, int, int], tuple[np.ndarray, dict[str, int]]]


def index_shards(
    folder: Path, shards: Sequence[tuple[str, Stamp]], suffixes: Suffixes, places: Sequence[Path]
) -> index.Index:
    """The index of shards, named within `folder`, of ENTRY; kept in one of `places`. `facts["left_out"]`: of each
    shard, what is no record, by reason. Raises DataError where a shard cannot be read, or no place can be written."""
    origin: dict[str, Any] = {
        "suffixes": [list(group) for group in suffixes],
        "shards": [[name, *stamp] for name, stamp in shards],
    }

    def make(append: index.Append, stale: index.Index | None) -> dict[str, Any]:
        known = _known(stale, origin["suffixes"])
        new = [str(folder / name) for name, stamp in shards if (name, *stamp) not in known]
        scans = scan_all(new, suffixes, min(cpu_count(), MAX_PROCESSES, len(new)))
        progress = Progress(f"shards of {folder} are indexed", len(shards))
        counts, left_out = [], []
        for number, (name, stamp) in enumerate(shards):
            if (name, *stamp) in known:
                entries, bad = known[(name, *stamp)]
            else:
                try:
                    found = next(scans)
                except (OSError, ScanError) as error:
                    raise DataError(f"the shard {folder / name} cannot be read ({error})") from error
                entries, bad = np.frombuffer(found.entries, ENTRY), found.left_out
            entries = entries.copy()
            entries["shard"] = number
            append(entries)
            counts.append(len(entries))
            left_out.append(bad)
            progress.at(number + 1)
        return {"counts": counts, "left_out": left_out}

    return index.obtain(places, ENTRY, origin, make)


def _known(stale: index.Index | None, suffixes: list[list[str]]) -> Known:
    """Of an index that no longer fits, the entries of each shard, which may be as it was."""
    if stale is None or stale.origin.get("suffixes") != suffixes:
        return {}
    known: Known = {}
    start = 0
    facts = zip(stale.origin["shards"], stale.facts["counts"], stale.facts["left_out"], strict=True)
    for (name, size, written), count, left_out in facts:
        known[name, size, written] = stale.entries[start : start + count], left_out
        start += count
    return known
