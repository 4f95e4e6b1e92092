"""The pictures of more vendors, to test on: each a set of its own, fetched and drawn when it is asked for.

A set holds a vendor's drawings of the concepts that are trained on. What a training picture gives away is dropped: a
drawing that is nearly equal to a training picture of its concept (see drawn.near).
"""

from __future__ import annotations

import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ..drawn import Contents, SetupError, fetch, prepare
from ..drawn.near import grey, near
from .concepts import read_concepts
from .drawings import Rendered, read_more_drawings, render
from .prepare import members, prepare_emoji
from .sources import PACKAGES, SHIFT_VENDORS
from .splits import UNSEEN_CONCEPT_SHARE, unseen_concepts

FORMAT = 1  # see prepare.FORMAT


def _trained(folder: Path) -> dict[str, list[np.ndarray]]:
    """Hexcode -> the training pictures of that concept in grey, from the shards of the set in `folder`."""
    greys: dict[str, list[np.ndarray]] = defaultdict(list)
    for shard in sorted(folder.glob("train-*.tar")):
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(".png"):
                    greys[member.name.partition("_")[0]].append(grey(file.read()))
    return greys


def _kept(pictures: list[Rendered], trained: dict[str, list[np.ndarray]], dropped: Counter[str]) -> list[Rendered]:
    kept: dict[str, Rendered] = {}
    for picture in pictures:
        small = grey(picture.png)
        if any(near(small, other) for other in trained[picture.drawing.concept.hexcode]):
            dropped["nearly equal to a training picture of its concept"] += 1
        elif picture.pixels in kept:
            dropped["same pixels as another of the set"] += 1
        else:
            kept[picture.pixels] = picture
    return list(kept.values())


def prepare_vendor(vendor: str, root: Path | None = None, *, size: int = 48, seed: int = 0) -> Path:
    """Fetch, rasterize and write the pictures of one of SHIFT_VENDORS once; return the folder that holds their shards,
    `VENDOR-000000.tar`, ..., with members as those of the emoji set, which is prepared too.

    root, size, seed   as for prepare_emoji; the seed fixes which concepts are seen in training

    Raises SetupError as prepare_emoji does, and for a vendor that is not known.
    """
    if vendor not in SHIFT_VENDORS:
        raise SetupError(f"no vendor of emoji is named {vendor!r}; allowed: {', '.join(SHIFT_VENDORS)}")
    package = SHIFT_VENDORS[vendor]
    emoji = prepare_emoji(root, size=size, seed=seed)
    root = emoji.parent

    def contents() -> Contents:
        packages = fetch(root, PACKAGES, "the emoji set")
        own = fetch(root, [package], f"the emoji of {vendor}")
        concepts, group_names = read_concepts(packages, seed)
        unseen = unseen_concepts(concepts, seed, UNSEEN_CONCEPT_SHARE)
        drawings = read_more_drawings(packages, vendor, package, own, concepts, size)
        seen = [drawing for drawing in drawings if drawing.concept.index not in unseen]
        pictures, blank = render(seen, size)
        dropped = Counter({"unseen concept": len(drawings) - len(seen), "blank or unreadable drawing": blank})
        kept = _kept(pictures, _trained(emoji), dropped)
        samples = [(picture.drawing.key, members(picture, group_names)) for picture in kept]
        return Contents({vendor: samples}, {}, {vendor: {vendor: len(kept)}}, dict(dropped))

    return prepare(root / f"{vendor}-size{size}-seed{seed}-v{FORMAT}", (*PACKAGES, package), size, seed, contents)
