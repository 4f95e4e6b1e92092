"""Ten million pairs: what it takes to open their index, and to find any of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import PYTHONPATH, ROOT
from helpers.layouts import make_pairs, members_of, tar_of

from train.data.sources import index
from train.data.sources.scan import Suffixes, scan
from train.data.sources.shard_index import ENTRY

SHARDS, EACH = 1000, 10_000
SUFFIXES = Suffixes(("jpg",), ("txt",))

# In a process of its own, whose memory nothing else has used.
OPEN = """
import json, sys, time
from pathlib import Path
import psutil
from train.data import StepSampler, open_source
from train.options import DataOptions

process, began = psutil.Process(), time.monotonic()
before = process.memory_info()
source = open_source(sys.argv[1], DataOptions(image_key="jpg", text_key="txt"))
sampler = StepSampler([len(source)], 4096, 0)
opened = time.monotonic()
for step in (0, 1, 10_000_000 // 4096, 123_456):
    for record in sampler.draw(step).record[:1000].tolist():
        found = source.read(record)
        shard, number = divmod(record, 10_000)
        assert found.key == f"{shard:05d}/{number % 2:09d}", (record, found.key)
read = time.monotonic()
after = process.memory_info()
print(json.dumps({
    "pairs": len(source),
    "open": opened - began,
    "read": read - opened,
    "resident": after.rss - before.rss,
    "own": after.rss - after.shared - (before.rss - before.shared),
}))
"""


@pytest.mark.long
def test_ten_million_pairs_are_opened_in_seconds_and_cost_no_memory(tmp_path: Path) -> None:
    """The shards are links to one of two records; the index says that each has 10,000."""
    (tmp_path / "shard").write_bytes(tar_of(list(members_of(make_pairs(2)))))
    for shard in range(SHARDS):
        (tmp_path / f"{shard:05d}.tar").hardlink_to(tmp_path / "shard")
    found = scan(str(tmp_path / "shard"), SUFFIXES)
    two = np.frombuffer(found.entries, ENTRY)
    status = (tmp_path / "shard").stat()
    names = [f"{shard:05d}.tar" for shard in range(SHARDS)]
    origin = {
        "suffixes": [list(group) for group in SUFFIXES],
        "shards": [[name, status.st_size, status.st_mtime_ns] for name in names],
    }

    def make(append: index.Append, stale: index.Index | None) -> dict[str, object]:
        for shard in range(SHARDS):
            entries = np.tile(two, EACH // 2)
            entries["shard"] = shard
            append(entries)
        return {"counts": [EACH] * SHARDS, "left_out": [{}] * SHARDS}

    places = index.places(tmp_path, ["*.tar", "jpg", "txt"], None)
    index.obtain(places, ENTRY, origin, make)
    size = places[0].stat().st_size
    assert size < 32.1 * SHARDS * EACH

    process = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path)],
        cwd=ROOT,
        env={"PYTHONPATH": PYTHONPATH, "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout)
    print(measured)
    assert measured["pairs"] == SHARDS * EACH
    assert measured["open"] < 30 and measured["read"] < 30
    assert measured["resident"] < 512 * 2**20, "with what is mapped of the index's 320 MB, once for all processes"
    assert measured["own"] < 64 * 2**20
