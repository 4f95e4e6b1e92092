"""The one-time set-up of the emoji set: fetch the packages, draw the pictures, write shards as anyone's might be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..captions import clean
from ..drawn import Contents, cache_root, check_request, fetch, prepare
from .concepts import read_concepts
from .drawings import Rendered, read_drawings, render
from .sources import PACKAGES
from .splits import SPLITS, split_pictures

CLASSES = "classes.json"
# Raised whenever what a set-up writes changes, captions and splits included. It is in the folder's name, so that a
# former version finds its own beside it.
FORMAT = 2


def members(picture: Rendered, group_names: Sequence[str]) -> dict[str, bytes]:
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


def _contents(root: Path, size: int, seed: int) -> Contents:
    packages = fetch(root, PACKAGES, "the emoji set")
    concepts, group_names = read_concepts(packages, seed)
    pictures, blank = render(read_drawings(packages, concepts, size), size)
    split = split_pictures(pictures, concepts, seed)
    classes = json.dumps(describe_groups(split.pictures["train"], group_names), indent=1, ensure_ascii=False)
    return Contents(
        {name: [(p.drawing.key, members(p, group_names)) for p in split.pictures[name]] for name in SPLITS},
        {CLASSES: classes.encode()},
        {name: dict(sorted(Counter(p.drawing.vendor for p in split.pictures[name]).items())) for name in SPLITS},
        {**split.dropped, "blank or unreadable drawing": blank},
    )


def prepare_emoji(root: Path | None = None, *, size: int = 48, seed: int = 0) -> Path:
    """Fetch, rasterize and write the emoji set once; return the folder that holds it.

    root  cache folder; by default `$SOFTCLIP_DATA/emoji`, or `~/.cache/softclip_kernels/emoji` where unset
    size  height and width of the pictures in pixels
    seed  fixes the splits and the wording of the captions

    The folder holds WebDataset shards `SPLIT-000000.tar`, ..., with png, txt and json members, of each of SPLITS; and
    `classes.json`, the classes that the samples name with the texts of each.

    A finished folder is returned at once; several processes may call together (see drawn.prepare). Raises SetupError
    where npm is missing or failed, a file has another hash than pinned, or an argument is out of range.
    """
    check_request(size, seed)
    root = cache_root("emoji") if root is None else Path(root).expanduser()
    folder = root / f"size{size}-seed{seed}-v{FORMAT}"
    return prepare(folder, PACKAGES, size, seed, lambda: _contents(root, size, seed))
