"""Sets that are fetched and drawn on demand, `emoji:` and `icons:`, and the classes that come with them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...options import DataOptions
from .. import emoji, icons
from ..record import DataError, Record, Source
from .reading import class_number, fingerprint_of
from .several import Concatenated
from .tar import TarSource

CLASSES, NAMES = "classes", "names"  # what has no pictures: the groups of emoji, the shared names of icons
EVERY = ("train", "heldout")  # of all icon sets to train on
SIZE = 48  # pixels, where nobody says


@dataclass(frozen=True)
class Drawn:
    """What `KIND:NAME[/names][@SIZE]` asks for; `by_name`: whether `/names` is there."""

    kind: str
    name: str
    by_name: bool
    size: int


def read_spec(spec: str) -> Drawn | None:
    """None for what is neither `emoji:` nor `icons:`. Raises DataError, before anything is fetched, where there is no
    such set, or the size is no number."""
    kind, _, rest = spec.partition(":")
    if kind not in ("emoji", "icons"):
        return None
    name, _, size = rest.partition("@")
    if size and not size.isdecimal():
        raise DataError(f"{spec}: {size!r} is no number of pixels; give one, as in {kind}:{name}@32")
    name, slash, view = name.partition("/")
    if kind == "emoji":
        if slash or name not in (*emoji.SPLITS, *emoji.SHIFT_VENDORS, CLASSES):
            raise DataError(
                f"{spec}: the emoji set has no split {rest.partition('@')[0]!r}; allowed: {', '.join(emoji.SPLITS)}; "
                f"of more vendors: {', '.join(emoji.SHIFT_VENDORS)}; as data.classes: {CLASSES}"
            )
    elif name not in (*EVERY, *icons.ICON_SETS, *(() if slash else (NAMES,))) or (slash and view != NAMES):
        raise DataError(
            f"{spec}: there is no such icon set; allowed: {', '.join((*EVERY, *icons.ICON_SETS))}, each also with "
            f"/{NAMES}; as data.classes: {NAMES}, or a set with categories"
        )
    return Drawn(kind, name, bool(slash), int(size or SIZE))


def prepare_drawn(drawn: Drawn, seed: int, root: Path | None = None) -> list[tuple[Path, str]]:
    """The folders that hold what is asked for, prepared if need be, and which of its splits each is read for.

    root  the cache folder of that kind, by default as prepare_emoji and prepare_icons have it

    Raises SetupError where one cannot be prepared.
    """
    if drawn.kind == "emoji" and drawn.name in emoji.SHIFT_VENDORS:
        return [(emoji.prepare_vendor(drawn.name, root, size=drawn.size, seed=seed), drawn.name)]
    if drawn.kind == "emoji":
        return [(emoji.prepare_emoji(root, size=drawn.size, seed=seed), drawn.name)]
    if drawn.name == NAMES:
        return [(icons.prepare_names(root), NAMES)]
    if drawn.name in EVERY:
        return [(icons.prepare_icons(name, root, size=drawn.size, seed=seed), drawn.name) for name in icons.TRAINING]
    return [(icons.prepare_icons(drawn.name, root, size=drawn.size, seed=seed), icons.splits_of(drawn.name)[0])]


def open_drawn(drawn: Drawn, options: DataOptions) -> Source:
    """Its pictures. Raises DataError where it has none, but classes."""
    if drawn.name in (CLASSES, NAMES):
        raise DataError(f"{drawn.kind}:{drawn.name} holds no pictures, but classes; give it as data.classes")
    sources = []
    for folder, split in prepare_drawn(drawn, options.seed):
        sources.append(TarSource(sorted(folder.glob(f"{split}-*.tar")), options, f"{split}-*.tar"))
    source = sources[0] if len(sources) == 1 else Concatenated(sources)
    return ByName(source, drawn_classes(Drawn("icons", NAMES, False, SIZE), options.seed)) if drawn.by_name else source


def drawn_classes(drawn: Drawn, seed: int) -> dict[str, list[str]]:
    """The subject groups of emoji, the shared names of icons, or the categories of an icon set, each with its texts.
    Raises DataError where there are none."""
    classes: dict[str, list[str]] = {}
    if drawn.kind == "icons" or drawn.name == CLASSES:
        for folder, _ in prepare_drawn(drawn, seed):
            classes |= json.loads((folder / emoji.CLASSES).read_text(encoding="utf-8"))
    if not classes:
        raise DataError(f"{drawn.kind}:{drawn.name} has no classes; allowed: emoji:{CLASSES}, icons:{NAMES}, a file")
    return classes


class ByName:
    """Those records of icons that show one of `names`, which becomes their class."""

    def __init__(self, source: Source, names: Iterable[str]) -> None:
        self._source = source
        self._names = {icons.label_of(name): name for name in names}
        labels = source.labels()
        assert labels is not None  # every icon has one
        self._numbers = np.flatnonzero(np.isin(labels, list(self._names)))
        self._labels = labels[self._numbers]
        self.left_out = source.left_out
        self.fingerprint = fingerprint_of([source.fingerprint, *self._names.values()], len(self), self.read)

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> Record:
        record = self._source.read(int(self._numbers[index]))
        return replace(record, class_name=self._names[int(self._labels[index])])

    def labels(self) -> np.ndarray:
        return self._labels

    def classes(self) -> np.ndarray:
        return np.array([class_number(self._names[label]) for label in self._labels.tolist()], dtype=np.int64)
