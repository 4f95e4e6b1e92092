"""Data sets of Hugging Face's `datasets` library, as `save_to_disk` wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...options import ConfigError, DataOptions
from ..captions import MAX_CAPTIONS, clean_all
from ..record import BadRecordError, DataError, Record
from . import columns
from .reading import check_class, check_label, check_left_out, class_numbers, fingerprint_of, printable, read_file

NO_LABEL = -1  # the library's word for it


class ArrowSource:
    """The rows of one split, memory-mapped by the library. The image column holds pictures (never decoded here) or the
    bytes of their files; the caption column a text or a list of texts. The label column may be a ClassLabel, whose
    names are then the classes.

    Raises ConfigError where the library is missing, DataError where the folder is no data set or lacks a column.
    """

    left_out: dict[str, int]

    def __init__(self, folder: Path, options: DataOptions) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(
                f"data.source=hf:{folder} needs the library `datasets`; pip install softclip-kernels[hf]"
            ) from error
        try:
            rows = datasets.load_from_disk(str(folder))
        except Exception as error:  # of the library, of Arrow, of the system
            raise DataError(
                f"{folder} cannot be read as a data set ({error}); give a folder that `save_to_disk` of Hugging Face's "
                "datasets wrote"
            ) from error
        if isinstance(rows, datasets.DatasetDict):
            splits = ", ".join(f"hf:{folder / split}" for split in rows)
            raise DataError(f"{folder} holds several splits; give one of them: {splits}")
        where = str(folder)
        names = rows.column_names
        self._image = columns.find_column(names, options.image_column, columns.IMAGE, "data.image_column", where)
        self._caption = columns.find_column(
            names, options.caption_column, columns.CAPTION, "data.caption_column", where
        )
        read = {self._image, self._caption, *({columns.LABEL, columns.CLASS} & set(names))}
        rows = rows.with_format(None).select_columns(sorted(read))
        if isinstance(rows.features[self._image], datasets.Image):
            rows = rows.cast_column(self._image, datasets.Image(decode=False))
        self._rows, self._name = rows, printable(folder.name)
        label = rows.features.get(columns.LABEL)
        self._classes: list[str] | None = label.names if isinstance(label, datasets.ClassLabel) else None
        self.left_out = {}
        check_left_out(where, len(self), self.left_out, options.max_bad_fraction)
        self.fingerprint = fingerprint_of([str(rows.features)], len(self), self.read)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Record:
        row = self._rows[index]
        texts = row[self._caption]
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or len(texts) > MAX_CAPTIONS or not all(isinstance(text, str) for text in texts):
            raise BadRecordError("no_caption")
        label = row.get(columns.LABEL)
        label = None if label == NO_LABEL else check_label(label)
        return Record(
            f"{self._name}:{index}",
            _bytes_of(row[self._image]),
            clean_all(texts),
            label,
            check_class(self._class_of(row)),
        )

    def _class_of(self, row: dict[str, Any]) -> Any:
        name, label = row.get(columns.CLASS), row.get(columns.LABEL)
        if name is None and self._classes is not None and label is not None and label >= 0:
            name = self._classes[label]
        return name

    def labels(self) -> np.ndarray | None:
        if columns.LABEL not in self._rows.column_names:
            return None
        column = self._rows.select_columns([columns.LABEL]).with_format("arrow")[:][columns.LABEL]
        if column.null_count or not str(column.type).startswith(("int", "uint")):
            return None
        labels = column.to_numpy().astype(np.int64)
        return None if (labels == NO_LABEL).any() else labels

    def classes(self) -> np.ndarray | None:
        present = [name for name in (columns.LABEL, columns.CLASS) if name in self._rows.column_names]
        if not present:
            return None
        return class_numbers(map(self._class_of, self._rows.select_columns(present)))


def _bytes_of(image: Any) -> bytes:
    """Those of a picture's file, which may lie beside the data set. Raises BadRecordError: missing_file."""
    if isinstance(image, dict):
        if image.get("bytes") is None and image.get("path"):
            try:
                return read_file(Path(image["path"]))
            except (OSError, ValueError) as error:
                raise BadRecordError("missing_file") from error
        image = image.get("bytes")
    if not isinstance(image, bytes):
        raise BadRecordError("missing_file")
    return image
