"""Shards: img2dataset's, and all others of WebDataset's form. Records are read where they lie."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...options import DataOptions
from ..captions import captions_of, read_fields
from ..record import BadRecordError, Record
from . import index
from .reading import (
    OpenFiles,
    Progress,
    check_class,
    check_label,
    check_left_out,
    class_number,
    fingerprint_of,
    printable,
    read_label,
    split_suffixes,
    stamp_of,
)
from .scan import BLOCK, Suffixes
from .shard_index import index_shards

MAX_CLS_BYTES = 32


class TarSource:
    """The records of tar files, one shard after another. The members of a record: a picture, a text or JSON with
    `captions` (a list) or `caption`; in the JSON also `label` and `class`; a `cls` member is a label too.

    shards   their paths, in order
    options  the suffixes of pictures and texts, and where the index may be kept
    named    how the shards were named within their folder, "*.tar" for instance: another name has another index

    Raises DataError where a shard is missing or cannot be read, and where too much of them is bad.
    """

    def __init__(self, shards: Sequence[Path], options: DataOptions, named: str) -> None:
        shards = [shard.absolute() for shard in shards]
        self._folder = Path(os.path.commonpath([shard.parent for shard in shards]))
        names = [os.path.relpath(shard, self._folder) for shard in shards]
        stamps = [stamp_of(shard, "shard") for shard in shards]
        suffixes = Suffixes(split_suffixes(options.image_key), split_suffixes(options.text_key))
        self._places = index.places(self._folder, [named, *map(";".join, suffixes)], options.index)
        self._index = index_shards(self._folder, list(zip(names, stamps, strict=True)), suffixes, self._places)
        self._entries = self._index.entries
        self._files = OpenFiles(shards, stamps)
        self._stems = [printable(name.removesuffix(".tar")) for name in names]
        self.left_out = dict(sum(map(Counter, self._index.facts["left_out"]), Counter[str]()))
        check_left_out(str(self._folder / named), len(self), self.left_out, options.max_bad_fraction)
        facts = [*map(os.path.basename, names), self._index.sha256]
        self.fingerprint = fingerprint_of(facts, len(self), self.read)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> Record:
        shard, block, size, text, text_size, table, table_size, cls = self._entries[index].item()
        data = self._files.read(shard, (block - 1) * BLOCK, BLOCK + size)
        key = f"{self._stems[shard]}/{self._stem(shard, block, data[:BLOCK])}"
        words = self._files.read(shard, (block + text) * BLOCK, text_size) if text else None
        fields = self._fields(shard, block + table, table_size) if table else {}
        captions, label = captions_of(words, fields), self._label(shard, block, fields, cls)
        return Record(key, data[BLOCK:], captions, label, check_class(fields.get("class")))

    def labels(self) -> np.ndarray | None:
        return self._of_all("labels", self._label)

    def classes(self) -> np.ndarray | None:
        def number(shard: int, block: int, fields: dict[str, Any], cls: int) -> int | None:
            name = check_class(fields.get("class"))
            return None if name is None else class_number(name)

        return self._of_all("classes", number)

    def _of_all(self, what: str, fact: Callable[[int, int, dict[str, Any], int], int | None]) -> np.ndarray | None:
        """(len,) int64, a number of every record, kept beside the index; None where one has none. `fact`: of the shard,
        the picture's block, the JSON's fields, and where the class member is (see shard_index.ENTRY)."""

        def make(append: index.Append, stale: index.Index | None) -> dict[str, Any]:
            facts = np.empty(len(self), np.int64)
            progress = Progress(f"{what} of {self._folder} are read", len(self))
            for number, entry in enumerate(self._entries):
                shard, block, _, _, _, table, size, cls = entry.item()
                try:
                    found = fact(shard, block, self._fields(shard, block + table, size) if table else {}, cls)
                except BadRecordError:
                    found = -1 - number  # nobody else's; it is left out once it is read
                if found is None:
                    return {"complete": False}
                facts[number] = found
                if number % 10_000 == 0:
                    progress.at(number)
            append(facts)
            return {"complete": True}

        origin = {"entries": self._index.sha256, **self._index.origin}
        paths = [path.with_suffix(f".{what}") for path in self._places]
        kept = index.obtain(paths, np.dtype("<i8"), origin, make)
        return kept.entries if kept.facts["complete"] else None

    def _stem(self, shard: int, block: int, header: bytes) -> str:
        """The name of a picture's file as its header has it, without suffixes. One that is long, or not ASCII, may
        stand elsewhere in full; the block tells it from others that look the same."""
        name = self._header(shard, header).name
        folder, slash, base = name.rpartition("/")
        unsure = f"@{block}" if header[99] or "?" in name or "\ufffd" in name else ""
        return printable(folder + slash + base.partition(".")[0]) + unsure

    def _label(self, shard: int, block: int, fields: dict[str, Any], cls: int) -> int | None:
        label = check_label(fields.get("label"))
        if label is not None or not cls:
            return label
        size = self._header(shard, self._files.read(shard, (block + cls - 1) * BLOCK, BLOCK)).size
        return read_label(self._files.read(shard, (block + cls) * BLOCK, min(size, MAX_CLS_BYTES)))

    def _header(self, shard: int, header: bytes) -> tarfile.TarInfo:
        try:
            return tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        except tarfile.TarError as error:
            raise self._files.changed(shard) from error

    def _fields(self, shard: int, block: int, size: int) -> dict[str, Any]:
        """The JSON of a record. Raises BadRecordError: broken_json."""
        return read_fields(self._files.read(shard, block * BLOCK, size))
