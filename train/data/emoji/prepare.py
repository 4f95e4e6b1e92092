"""The one-time set-up of the emoji set: fetch the packages, draw the pictures, write shards as anyone's might be."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ... import lock
from ...files import sha256_of, write_new
from ...signals import say
from ..captions import clean
from ..shards import write_shard
from .concepts import read_concepts
from .drawings import Rendered, read_drawings, render
from .manifest import FORMAT, MANIFEST, Manifest, read_manifest, write_manifest
from .sources import WORD_SECONDS, SetupError, default_root, fetch_packages, pins
from .splits import SPLITS, split_pictures

CLASSES = "classes.json"
SHARD_SAMPLES = 1000
SMALLEST, LARGEST = 8, 1024  # pixels a side


def _is_ready(folder: Path, size: int, seed: int) -> bool:
    """Whether the folder's manifest fits the request and every file still has the sum it was written with."""
    made = read_manifest(folder)
    try:
        return (
            made is not None
            and (made.size, made.seed, made.packages) == (size, seed, pins())
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


def _members(picture: Rendered, group_names: Sequence[str]) -> dict[str, bytes]:
    """A sample's, by suffix. `label`: the concept, by which `data.distinct=label` knows drawings of one thing."""
    concept = picture.drawing.concept
    table: dict[str, Any] = {
        "captions": list(concept.captions),
        "class": group_names[concept.group],
        "hexcode": concept.hexcode,
        "label": concept.index,
        "vendor": picture.drawing.vendor,
    }
    return {
        "png": picture.png,
        "txt": concept.captions[0].encode(),
        "json": json.dumps(table, sort_keys=True, ensure_ascii=False).encode(),
    }


def describe_groups(train: Sequence[Rendered], group_names: Sequence[str]) -> dict[str, list[str]]:
    """Each group in words: the labels of its concepts in the training split, or its name where it has none there."""
    concepts = [picture.drawing.concept for picture in train]
    words: dict[str, list[str]] = {name: [] for name in group_names}
    for label, group in sorted({(clean(concept.label), concept.group) for concept in concepts}):
        words[group_names[group]].append(label)
    return {name: labels or [name.replace("-", " and ")] for name, labels in words.items()}


def _write(folder: Path, packages: Path, size: int, seed: int) -> None:
    """Write all files of one (size, seed), then their manifest."""
    import resvg_py  # whoever reads other data needs none

    folder.mkdir(parents=True, exist_ok=True)
    # What a killed set-up left is worthless without its manifest, which goes first. Nothing else is removed: other
    # people may have put files there.
    shards_left = [path for split in SPLITS for path in folder.glob(f"{split}-??????.tar*")]
    for stale in [folder / MANIFEST, folder / CLASSES, *shards_left]:
        stale.unlink(missing_ok=True)
    concepts, group_names = read_concepts(packages, seed)
    pictures, blank = render(read_drawings(packages, concepts, size), size)
    split = split_pictures(pictures, concepts, seed)
    names, counts = [CLASSES], {}
    for name in SPLITS:
        chosen = split.pictures[name]
        for start in range(0, len(chosen), SHARD_SAMPLES):
            names.append(f"{name}-{start // SHARD_SAMPLES:06d}.tar")
            part = chosen[start : start + SHARD_SAMPLES]
            write_shard(folder / names[-1], ((p.drawing.key, _members(p, group_names)) for p in part))
        counts[name] = dict(sorted(Counter(p.drawing.vendor for p in chosen).items()))
    classes = json.dumps(describe_groups(split.pictures["train"], group_names), indent=1, ensure_ascii=False)
    write_new(folder / CLASSES, classes.encode())
    files = {name: sha256_of(folder / name) for name in names}
    dropped = {**split.dropped, "blank or unreadable drawing": blank}
    renderer = f"resvg {resvg_py.__resvg_version__}"
    write_manifest(folder, Manifest(size, seed, pins(), files, counts, dropped, renderer))


def prepare_emoji(root: Path | None = None, *, size: int = 48, seed: int = 0) -> Path:
    """Fetch, rasterize and write the emoji set once; return the folder that holds it.

    root  cache folder; by default `$SOFTCLIP_DATA/emoji`, or `~/.cache/softclip_kernels/emoji` where unset
    size  height and width of the pictures in pixels
    seed  fixes the splits and the wording of the captions

    The folder holds WebDataset shards `SPLIT-000000.tar`, ..., with png, txt and json members, of each of SPLITS; and
    `classes.json`, the classes that the samples name with the texts of each.

    A finished folder is returned at once. Several processes may call together: one works, the others wait for its
    lock. A set-up that was killed is done again. Raises SetupError where npm is missing or failed, a file has another
    hash than pinned, or an argument is out of range.
    """
    if not SMALLEST <= size <= LARGEST:
        raise SetupError(f"size is {size!r}; from {SMALLEST} to {LARGEST} pixels are allowed")
    if seed < 0:
        raise SetupError(f"seed is {seed!r}; a whole number from 0 is allowed")
    root = default_root() if root is None else Path(root).expanduser()
    folder = root / f"size{size}-seed{seed}-v{FORMAT}"
    if _is_ready(folder, size, seed):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        if not _is_ready(folder, size, seed):
            _write(folder, fetch_packages(root), size, seed)
    return folder
