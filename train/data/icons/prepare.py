"""The one-time set-up of icon sets: fetch a set's package, draw it, write shards."""

from __future__ import annotations

import colorsys
import json
import random
from collections import Counter
from pathlib import Path

from ..drawn import (
    Contents,
    Sample,
    SetupError,
    cache_root,
    check_request,
    fetch,
    prepare,
    rasterize,
    read_json,
    svg_of,
)
from .sources import ICON_SETS
from .words import Icon, category_words, label_of, read_icons, stable_number

CLASSES = "classes.json"
FORMAT = 1  # raised whenever what a set-up writes changes; it is in the folder's name
HELDOUT_SHARE = 0.1
DARKEST, BRIGHTEST = 0.0, 0.55  # of a color's value
SHARED_BY = 4  # training sets that have a name, for it to be one of the shared names
TRAINING = tuple(name for name, icons in ICON_SETS.items() if icons.trained)


def splits_of(name: str) -> tuple[str, ...]:
    """Those of an icon set: one for training has held-out names of its own, another is held out as a whole."""
    return ("train", "heldout") if ICON_SETS[name].trained else ("shift",)


def _split(name: str, icon: Icon, seed: int) -> str:
    """All drawings of one name go together: a set's styles of one thing are near copies."""
    if not ICON_SETS[name].trained:
        return "shift"
    return "heldout" if stable_number(f"{seed}:{name}:{icon.name}") < HELDOUT_SHARE * 2**64 else "train"


def ink(name: str, key: str, seed: int) -> str:
    """A dark color for what a set leaves to the page, a function of its arguments: by one color for all, a model could
    tell the set."""
    rng = random.Random(f"{seed}:{name}:{key}")
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.random(), rng.uniform(DARKEST, BRIGHTEST))
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _members(name: str, icon: Icon, png: bytes) -> dict[str, bytes]:
    table = {"captions": list(icon.captions), "label": label_of(icon.name), "set": name}
    if icon.category is not None:
        table["class"] = icon.category
    return {
        "png": png,
        "txt": icon.name.encode(),
        "json": json.dumps(table, sort_keys=True, ensure_ascii=False).encode(),
    }


def _contents(root: Path, name: str, size: int, seed: int) -> Contents:
    icons = ICON_SETS[name]
    packages = fetch(root, icons.packages, f"the icon set {name}")
    drawings = read_json(packages, icons.package, "icons.json")
    samples: dict[str, list[Sample]] = {split: [] for split in splits_of(name)}
    blank = 0
    read = read_icons(packages, icons, seed)
    for icon in read:
        picture = rasterize(svg_of(drawings, icon.key, size, ink(name, icon.key, seed)), size)
        if picture is None:
            blank += 1
        else:
            samples[_split(name, icon, seed)].append((f"{name}_{icon.key}", _members(name, icon, picture.png)))
    for split, drawn in samples.items():
        random.Random(f"order:{split}:{seed}").shuffle(drawn)  # as for emoji: a reader of a stream sees no order
    categories = sorted({icon.category for icon in read if icon.category is not None})
    classes = {category: [category_words(category)] for category in categories}
    counts = {split: {name: len(drawn)} for split, drawn in samples.items()}
    return Contents(samples, _json(classes), counts, {"blank or unreadable drawing": blank})


def _json(classes: dict[str, list[str]]) -> dict[str, bytes]:
    return {CLASSES: json.dumps(classes, indent=1, ensure_ascii=False).encode()}


def prepare_icons(name: str, root: Path | None = None, *, size: int = 48, seed: int = 0) -> Path:
    """Fetch, rasterize and write one of ICON_SETS once; return the folder that holds it.

    root  cache folder; by default `$SOFTCLIP_DATA/icons`, or `~/.cache/softclip_kernels/icons` where unset
    size  height and width of the pictures in pixels
    seed  fixes which names are held out, the colors, and the order of tags

    The folder holds WebDataset shards `SPLIT-000000.tar`, ..., with png, txt and json members, of each of
    `splits_of(name)`; and `classes.json`, the set's categories in words.

    A finished folder is returned at once; several processes may call together (see drawn.prepare). Raises SetupError
    where npm is missing or failed, a file has another hash than pinned, or an argument is out of range.
    """
    if name not in ICON_SETS:
        raise SetupError(f"no icon set is named {name!r}; allowed: {', '.join(ICON_SETS)}")
    check_request(size, seed)
    root = cache_root("icons") if root is None else Path(root).expanduser()
    folder = root / f"{name}-size{size}-seed{seed}-v{FORMAT}"
    return prepare(folder, ICON_SETS[name].packages, size, seed, lambda: _contents(root, name, size, seed))


def prepare_names(root: Path | None = None) -> Path:
    """The folder with the shared names as `classes.json`: those that at least SHARED_BY training sets draw, each
    described by itself. The packages of all training sets are fetched for it."""
    root = cache_root("icons") if root is None else Path(root).expanduser()

    def contents() -> Contents:
        shared: Counter[str] = Counter()
        for name in TRAINING:
            packages = fetch(root, ICON_SETS[name].packages, f"the icon set {name}")
            shared.update({icon.name for icon in read_icons(packages, ICON_SETS[name], 0)})
        names = sorted(name for name in shared if shared[name] >= SHARED_BY)
        return Contents({}, _json({name: [name] for name in names}), {"names": {"shared": len(names)}})

    packages = [package for name in TRAINING for package in ICON_SETS[name].packages]
    return prepare(root / f"names-v{FORMAT}", packages, 0, 0, contents)
