"""Tables: a CSV or TSV file with a column of paths and a column of captions."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...options import DataOptions
from ..captions import clean_all
from ..record import BadRecordError, DataError, Record
from . import columns, index
from .reading import (
    OpenFiles,
    Progress,
    check_class,
    check_left_out,
    class_numbers,
    fingerprint_of,
    printable,
    read_file,
    read_label,
    stamp_of,
)

ROW = np.dtype([("start", "<u8"), ("end", "<u8"), ("label", "<i8")])  # the first byte of a row, that after it
NO_LABEL = -1
BROKEN_LABELS = -2  # and below: of rows whose label is no number, each its own; they are left out once they are read
MAX_LINE_BYTES = 1 << 20


class TableSource:
    """One record for each row, quoted as RFC 4180 says, in UTF-8. Paths are relative to the table's folder. Columns
    `label` and `class` are read where there are any. One pass over the file makes an index of 24 bytes a row.

    Raises DataError where the file cannot be read or lacks a column, and where a row is no CSV.
    """

    left_out: dict[str, int]

    def __init__(self, path: Path, options: DataOptions) -> None:
        self._path, self._folder = path, path.absolute().parent
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        stamp = self._stamp = stamp_of(path, "table")
        origin = {"name": path.name, "stamp": list(stamp)}
        places = index.places(self._folder, [path.name], options.index)
        kept = index.obtain(places, ROW, origin, self._index)
        self._rows, self._columns = kept.entries, kept.facts["columns"]
        where = str(path)
        self._image, self._caption = (
            self._columns.index(columns.find_column(self._columns, chosen, customary, f"data.{option}", where))
            for chosen, customary, option in (
                (options.image_column, columns.IMAGE, "image_column"),
                (options.caption_column, columns.CAPTION, "caption_column"),
            )
        )
        self._files = OpenFiles([path], [stamp])
        self.left_out = {}
        check_left_out(where, len(self), self.left_out, options.max_bad_fraction)
        facts = [kept.sha256, *self._columns, str(self._image), str(self._caption)]
        self.fingerprint = fingerprint_of(facts, len(self), self.read)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Record:
        start, end, label = self._rows[index].item()
        row = self._row(self._files.read(0, start, end - start))
        if label <= BROKEN_LABELS:
            raise BadRecordError("broken_label")
        fields = dict(zip(self._columns, row, strict=True))
        try:
            image = read_file(self._folder / row[self._image])
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise BadRecordError("missing_file") from error
        return Record(
            f"{printable(self._path.name)}:{index + 1}",
            image,
            clean_all([row[self._caption]]),
            None if label == NO_LABEL else label,
            check_class(fields.get(columns.CLASS)),
        )

    def labels(self) -> np.ndarray | None:
        labels = self._rows["label"]
        return None if (labels == NO_LABEL).any() else labels.astype(np.int64)

    def classes(self) -> np.ndarray | None:
        if columns.CLASS not in self._columns:
            return None
        progress = Progress(f"classes of {self._path} are read", len(self))
        at = self._columns.index(columns.CLASS)

        def names() -> Iterator[str]:
            for number, entry in enumerate(self._rows):
                start, end, _ = entry.item()
                try:
                    yield self._row(self._files.read(0, start, end - start))[at]
                except BadRecordError:
                    yield f"row {number}"  # nobody else's; it is left out once it is read
                if number % 10_000 == 0:
                    progress.at(number)

        return class_numbers(names())

    def _row(self, data: bytes) -> list[str]:
        """Raises BadRecordError: broken_text, or broken_row where it has more or fewer fields than columns."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecordError("broken_text") from error
        row = next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter))
        if len(row) != len(self._columns):
            raise BadRecordError("broken_row")
        return row

    def _index(self, append: index.Append, stale: index.Index | None) -> dict[str, Any]:
        rows = self._spans()
        names = [name.strip() for name in next(rows, (0, 0, [""]))[2]]
        label_at = names.index(columns.LABEL) if columns.LABEL in names else None
        progress = Progress(f"bytes of {self._path} are indexed", self._stamp[0])
        found: list[tuple[int, int, int]] = []
        for number, (start, end, row) in enumerate(rows):
            found.append((start, end, _label(row, label_at, number)))
            if len(found) == 100_000:
                append(np.array(found, ROW))
                found = []
                progress.at(end)
        append(np.array(found, ROW))
        return {"columns": names}

    def _spans(self) -> Iterator[tuple[int, int, list[str]]]:
        """Of each row that is not empty, the header first: its first byte, that after it, and its fields."""
        position = 0

        def lines() -> Iterator[str]:
            nonlocal position
            with self._path.open("rb") as file:
                while line := file.readline(MAX_LINE_BYTES):
                    if len(line) == MAX_LINE_BYTES:
                        raise csv.Error(f"a line of {MAX_LINE_BYTES} bytes or more")
                    position += len(line)
                    text = line.decode("utf-8", "surrogateescape")
                    yield text.removeprefix("\ufeff") if position == len(line) else text

        reader = csv.reader(lines(), delimiter=self._delimiter)
        start = 0
        try:
            for row in reader:
                if row:
                    yield start, position, row
                start = position
        except csv.Error as error:
            raise DataError(
                f"{self._path}, line {reader.line_num}: {error}; is a quote opened there and not closed? Quotes within "
                "a quoted field are written twice"
            ) from error
        except OSError as error:
            raise DataError(f"{self._path} cannot be read ({error.strerror})") from error


def _label(row: list[str], at: int | None, number: int) -> int:
    if at is None or at >= len(row) or not row[at].strip():
        return NO_LABEL
    try:
        label = read_label(row[at])
    except BadRecordError:
        label = BROKEN_LABELS - number
    return NO_LABEL if label is None else label
