"""Folders of pictures: each with a text file of its name, or in a folder that is named as its class."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...options import DataOptions
from ..captions import clean_all, read_text
from ..record import DataError, Record
from .reading import (
    Progress,
    check_class,
    check_left_out,
    class_numbers,
    fingerprint_of,
    is_plain,
    read_file,
    split_suffixes,
)


class FolderSource:
    """The pictures of a folder and all below it, sorted by path within each folder; what is hidden is passed over.
    Where any has a text of the same name beside it, that is its caption, and those without are left out. Where none
    has, the folder right below `root` that a picture lies in is its class: the caption is "a photo of a ..." and the
    label is the number of the class by name.

    Paths are held packed, at their own length and 8 bytes each. Raises DataError where a folder cannot be read or too
    much is left out.
    """

    def __init__(self, root: Path, options: DataOptions) -> None:
        self._root = root
        images = split_suffixes(options.image_key)
        texts = split_suffixes(options.text_key)
        left_out = Counter[str]()
        captioned, bare = _Paths(), _Paths()
        for picture, text in _pictures(root, images, texts, left_out):
            if text is None:
                bare.add(picture)
            else:
                captioned.add(f"{picture}\0{text}")
        self._captioned = bool(captioned)
        if captioned:
            left_out["missing_member"] += len(bare)
            self._paths = captioned
        else:
            self._paths = _Paths()
            for picture in bare:
                if os.sep in picture:
                    self._paths.add(picture)
                else:
                    left_out["missing_member"] += 1
        names = () if captioned else {path.partition(os.sep)[0] for path in self._paths}
        self._classes = {name: number for number, name in enumerate(sorted(names))}
        self.left_out = dict(+left_out)
        check_left_out(str(root), len(self), self.left_out, options.max_bad_fraction)
        self.fingerprint = fingerprint_of([self._paths.sha256()], len(self), self.read)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Record:
        path, _, text = self._paths[index].partition("\0")
        image = self._read(path)
        if self._captioned:
            return Record(path, image, clean_all([read_text(self._read(text))]))
        name = path.partition(os.sep)[0]
        words = _words(name)
        return Record(path, image, clean_all([f"a photo of a {words}"]), self._classes[name], check_class(words))

    def labels(self) -> np.ndarray | None:
        if self._captioned:
            return None
        return np.array([self._classes[path.partition(os.sep)[0]] for path in self._paths], np.int64)

    def classes(self) -> np.ndarray | None:
        labels = self.labels()
        numbers = class_numbers(map(_words, self._classes))
        return None if labels is None or numbers is None else numbers[labels]

    def _read(self, path: str) -> bytes:
        try:
            return read_file(self._root / path)
        except OSError as error:
            raise DataError(
                f"{self._root / path} can no longer be read ({error.strerror}); leave data alone while a run reads them"
            ) from error


class _Paths:
    """Many short texts in one array of bytes: as Python's strings ten million take gigabytes."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("Q", [0])

    def add(self, path: str) -> None:
        self._bytes += os.fsencode(path)
        self._ends.append(len(self._bytes))

    def sha256(self) -> str:
        return hashlib.sha256(self._ends.tobytes() + self._bytes).hexdigest()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(bytes(self._bytes[self._ends[index] : self._ends[index + 1]]))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def _pictures(
    root: Path, images: tuple[str, ...], texts: tuple[str, ...], left_out: Counter[str]
) -> Iterator[tuple[str, str | None]]:
    """The path of each picture within `root`, and that of its text."""

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read ({error.strerror})") from error

    progress = Progress(f"folders below {root} are listed", None)
    seen = set[tuple[int, int]]()  # links may lead in a circle
    for number, (folder, below, files) in enumerate(os.walk(root, onerror=refuse, followlinks=True)):
        progress.at(number)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        start = "" if inside == os.curdir else inside + os.sep
        visible = sorted(name for name in files if not name.startswith("."))
        stems = {name: name.rpartition(".")[0] for name in visible if _suffix(name) in texts}
        by_stem = {stem: name for name, stem in stems.items()}
        for name in visible:
            if _suffix(name) not in images:
                continue
            if is_plain(start + name):
                text = by_stem.get(name.rpartition(".")[0])
                yield start + name, None if text is None else start + text
            else:
                left_out["unsafe_member"] += 1


def _words(folder: str) -> str:
    return folder.replace("_", " ")


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""
