"""A prepared folder: ordinary WebDataset shards and a manifest, written once, under a lock."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ... import lock
from ...files import sha256_of, write_new
from ...signals import say
from ..shards import write_shard
from .manifest import MANIFEST, Manifest, read_manifest, write_manifest
from .packages import WORD_SECONDS, Package, SetupError, pins

SHARD_SAMPLES = 1000
SMALLEST, LARGEST = 8, 1024  # pixels a side

Sample = tuple[str, Mapping[str, bytes]]  # key, and members by suffix


@dataclass(frozen=True)
class Contents:
    """What a folder is to hold: `samples` by split, further `files` by name; `counts` and `dropped` as in a
    Manifest."""

    samples: Mapping[str, Sequence[Sample]]
    files: Mapping[str, bytes]
    counts: dict[str, dict[str, int]]
    dropped: dict[str, int] = field(default_factory=dict)


def check_request(size: int, seed: int) -> None:
    """Raises SetupError where a size in pixels or a seed is out of range."""
    if not SMALLEST <= size <= LARGEST:
        raise SetupError(f"size is {size!r}; from {SMALLEST} to {LARGEST} pixels are allowed")
    if seed < 0:
        raise SetupError(f"seed is {seed!r}; a whole number from 0 is allowed")


def prepare(folder: Path, packages: Sequence[Package], size: int, seed: int, make: Callable[[], Contents]) -> Path:
    """Write what `make` returns into `folder`, made from `packages`, unless that was done already; return the folder.

    Several processes may call together: one works, the others wait for the lock of the folder's parent, which `make`
    runs under. A set-up that was killed is done again.
    """
    if _is_ready(folder, packages, size, seed):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent):
        if not _is_ready(folder, packages, size, seed):
            _write(folder, packages, size, seed, make())
    return folder


def _is_ready(folder: Path, packages: Sequence[Package], size: int, seed: int) -> bool:
    """Whether the folder's manifest fits the request and every file still has the sum it was written with."""
    made = read_manifest(folder)
    try:
        return (
            made is not None
            and (made.size, made.seed, made.packages) == (size, seed, pins(packages))
            and all(sha256_of(folder / name) == sum_ for name, sum_ in made.files.items())
        )
    except OSError:
        return False


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold `<root>/.lock`. The kernel frees it when the process ends, however it ends. A process that waits long for it
    says so: another job may be fetching."""
    with (root / ".lock").open("w") as file:
        if not lock.take(file, WORD_SECONDS):
            say(f"waiting for another process that prepares {root}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(folder: Path, packages: Sequence[Package], size: int, seed: int, contents: Contents) -> None:
    """Write all files, then their manifest."""
    import resvg_py  # whoever reads other data needs none

    folder.mkdir(parents=True, exist_ok=True)
    # What a killed set-up left is worthless without its manifest, which goes first. Nothing else is removed: other
    # people may have put files there.
    shards_left = [path for split in contents.samples for path in folder.glob(f"{split}-??????.tar*")]
    for stale in [folder / MANIFEST, *(folder / name for name in contents.files), *shards_left]:
        stale.unlink(missing_ok=True)
    names = []
    for split, samples in contents.samples.items():
        for start in range(0, len(samples), SHARD_SAMPLES):
            names.append(f"{split}-{start // SHARD_SAMPLES:06d}.tar")
            write_shard(folder / names[-1], samples[start : start + SHARD_SAMPLES])
    for name, data in contents.files.items():
        names.append(name)
        write_new(folder / name, data)
    files = {name: sha256_of(folder / name) for name in names}
    renderer = f"resvg {resvg_py.__resvg_version__}"
    write_manifest(folder, Manifest(size, seed, pins(packages), files, contents.counts, contents.dropped, renderer))
