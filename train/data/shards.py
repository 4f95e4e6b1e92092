"""WebDataset shards: plain tar files in which the members of one sample, `KEY.SUFFIX`, follow one another."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write (key, {suffix: bytes}) samples to a tar file; keys hold no dot.

    It is written under another name, then renamed. The bytes depend on nothing but the samples (no times, no owners).
    """
    scratch = path.with_name(path.name + ".tmp")
    with tarfile.open(scratch, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for suffix, payload in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    scratch.replace(path)
