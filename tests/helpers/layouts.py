"""Image-text pairs, laid out in every way that a source reads."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Member = tuple[str | tarfile.TarInfo, bytes]


class Pair(NamedTuple):
    stem: str
    image: bytes
    caption: str


def picture(mode: str = "RGBA", size: int = 16, form: str = "PNG", seed: int | None = None) -> bytes:
    """A picture's file: plain, or noise of that seed in RGB."""
    if seed is None:
        image = Image.new(mode, (size, size), 200)
    else:
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def make_pairs(count: int) -> list[Pair]:
    """Different pictures; the captions take quoting in a table."""
    return [
        Pair(f"{number:09d}", picture(form="JPEG", seed=number), f'picture "{number}", of thing {number % 7}')
        for number in range(count)
    ]


def tar_of(members: Sequence[Member], mode: str = "w", form: int = tarfile.DEFAULT_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as tar:  # type: ignore[call-overload]
        for name, payload in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def members_of(pairs: Sequence[Pair], **fields: Any) -> Iterator[Member]:
    """jpg and txt of each pair; with `fields`, JSON that holds them too."""
    for pair in pairs:
        yield f"{pair.stem}.jpg", pair.image
        yield f"{pair.stem}.txt", pair.caption.encode()
        if fields:
            yield f"{pair.stem}.json", json.dumps(fields).encode()


def write_shards(folder: Path, pairs: Sequence[Pair], size: int, **fields: Any) -> Path:
    """Shards of `size` pairs: 00000.tar and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(pairs), size)):
        members = list(members_of(pairs[start : start + size], **fields))
        (folder / f"{number:05d}.tar").write_bytes(tar_of(members))
    return folder


def write_folder(folder: Path, pairs: Sequence[Pair]) -> Path:
    folder.mkdir(parents=True)
    for pair in pairs:
        (folder / f"{pair.stem}.jpg").write_bytes(pair.image)
        (folder / f"{pair.stem}.txt").write_text(pair.caption, encoding="utf-8")
    return folder


def write_table(path: Path, pairs: Sequence[Pair], delimiter: str = ",") -> Path:
    """A CSV file, and the pictures in a folder beside it."""
    images = path.parent / "images"
    images.mkdir(parents=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(("filepath", "title"))
        for pair in pairs:
            (images / f"{pair.stem}.jpg").write_bytes(pair.image)
            table.writerow((f"images/{pair.stem}.jpg", pair.caption))
    return path
