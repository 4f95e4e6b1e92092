"""The one-time set-up of the emoji set: fetch the packages, draw the pictures, write the shards and the manifest."""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import resvg_py

from ... import lock
from ...files import sha256_of
from ...signals import say
from ..manifest import MANIFEST_NAME, DataError, Manifest, Shard, read_manifest, write_manifest
from ..shards import MAX_PIXELS, write_shard
from .concepts import read_concepts
from .drawings import Rendered, read_drawings, render
from .sources import WORD_SECONDS, SetupError, default_root, fetch_packages, pins
from .splits import SPLITS, split_pictures

SHARD_SAMPLES = 1000


def _is_ready(folder: Path, size: int, seed: int) -> bool:
    """Whether the folder's manifest fits the request and every shard still has the hash it was written with."""
    try:
        manifest = read_manifest(folder)
        fits = (manifest.size, manifest.seed, manifest.packages) == (size, seed, pins())
        shards = [shard for group in manifest.shards.values() for shard in group]
        return fits and all(sha256_of(folder / shard.name) == shard.sha256 for shard in shards)
    except (DataError, OSError):
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


def _record(picture: Rendered, group_names: tuple[str, ...]) -> dict[str, Any]:
    concept = picture.drawing.concept
    return {
        "captions": list(concept.captions),
        "concept": concept.index,
        "group": group_names[concept.group],
        "hexcode": concept.hexcode,
        "vendor": picture.drawing.vendor,
    }


def _write(folder: Path, packages: Path, size: int, seed: int) -> None:
    """Write all shards of one (size, seed), then their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    # What a killed set-up or an older version left is worthless without its manifest, which goes first. Nothing else is
    # removed: other people may have put files there.
    shards_left = [path for split in SPLITS for path in folder.glob(f"{split}-??????.tar*")]
    for stale in [folder / MANIFEST_NAME, *shards_left]:
        stale.unlink(missing_ok=True)
    concepts, group_names = read_concepts(packages, seed)
    pictures, blank = render(read_drawings(packages, concepts, size), size)
    split = split_pictures(pictures, concepts, seed)
    shards: dict[str, tuple[Shard, ...]] = {}
    counts: dict[str, dict[str, int]] = {}
    for name in SPLITS:
        chosen = split.pictures[name]
        shards[name] = tuple(
            write_shard(
                folder / f"{name}-{start // SHARD_SAMPLES:06d}.tar",
                ((p.drawing.key, p.png, _record(p, group_names)) for p in chosen[start : start + SHARD_SAMPLES]),
            )
            for start in range(0, len(chosen), SHARD_SAMPLES)
        )
        counts[name] = dict(sorted(Counter(p.drawing.vendor for p in chosen).items()))
    dropped = {**split.dropped, "blank or unreadable drawing": blank}
    renderer = f"resvg {resvg_py.__resvg_version__}"
    write_manifest(folder, Manifest(size, seed, pins(), group_names, shards, counts, dropped, renderer))


def prepare_emoji(root: Path | None = None, *, size: int = 48, seed: int = 0) -> Path:
    """Fetch, rasterize and write the emoji set once; return the folder that `load_pairs` reads.

    root  cache folder; by default `$SOFTCLIP_DATA/emoji`, or `~/.cache/softclip_kernels/emoji` where unset
    size  height and width of the pictures in pixels
    seed  fixes the splits and the wording of the captions

    A folder with a valid manifest is returned at once. Several processes may call together: one works, the others
    wait for its lock. A set-up that was killed is done again. Raises SetupError where npm is missing or failed, a file
    has another hash than pinned, or an argument is out of range.
    """
    if not 8 <= size <= int(MAX_PIXELS**0.5):
        raise SetupError(f"size is {size!r}; from 8 to {int(MAX_PIXELS**0.5)} pixels are allowed")
    if seed < 0:
        raise SetupError(f"seed is {seed!r}; a whole number from 0 is allowed")
    root = default_root() if root is None else Path(root).expanduser()
    folder = root / f"size{size}-seed{seed}"
    if _is_ready(folder, size, seed):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        if not _is_ready(folder, size, seed):
            _write(folder, fetch_packages(root), size, seed)
    return folder
