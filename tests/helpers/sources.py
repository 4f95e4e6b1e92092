"""Image-text pairs in memory, and towers' preprocessing that shows in its results what it was given."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from train.data.record import BadRecordError, DataError, Record
from train.data.sources.reading import class_numbers

SIDE, LENGTH = 4, 16  # of a prepared picture, and of a tokenized caption


class Listed:
    """A source of records in a list; in the place of a record, what happens where it is read."""

    fingerprint = "0" * 64

    def __init__(self, records: Sequence[Record | Exception | str]) -> None:
        self.records = list(records)
        self.left_out: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> Record:
        record = self.records[index]
        if isinstance(record, Exception):
            raise record
        if record == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if record == "stuck":
            time.sleep(3600)
        assert isinstance(record, Record)
        return record

    def labels(self) -> np.ndarray | None:
        each = enumerate(self.records)
        known = [record.label if isinstance(record, Record) else -1 - number for number, record in each]
        return None if None in known else np.array(known, dtype=np.int64)

    def classes(self) -> np.ndarray | None:
        each = enumerate(self.records)
        return class_numbers(record.class_name if isinstance(record, Record) else f"bad {n}" for n, record in each)


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), color).save(buffer, "PNG")
    return buffer.getvalue()


def record(number: int, labels: int | None = None) -> Record:
    """Its picture, key and three captions tell its number; with `labels`, number modulo so many is its label, and of
    four labels in a row each has another class."""
    captions = tuple(f"{number} in words {way}" for way in range(3))
    label = None if labels is None else number % labels
    class_name = None if label is None else f"class {label % 4}"
    return Record(f"r{number}", png((number // 256, number % 256, 7)), captions, label, class_name)


def listed(count: int, labels: int | None = None, instead: dict[int, Exception | str] | None = None) -> Listed:
    return Listed([(instead or {}).get(number, record(number, labels)) for number in range(count)])


def bad(reason: str = "broken_image") -> BadRecordError:
    return BadRecordError(reason)


def broken() -> DataError:
    return DataError("the file pairs.tar is gone; bring it back")


def prepare(images: Sequence[Image.Image], seeds: np.ndarray | None) -> torch.Tensor:
    """Pixels, moved by a number that only the picture's own seed gives."""
    pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]).transpose(0, 3, 1, 2)
    moved = np.zeros(len(images)) if seeds is None else [np.random.default_rng(seed).random() for seed in seeds]
    return torch.from_numpy(pixels + np.array(moved, dtype=np.float32)[:, None, None, None])


def tokenize(captions: Sequence[str]) -> torch.Tensor:
    """Bytes, cut and padded."""
    return torch.tensor([[*caption.encode()[:LENGTH].ljust(LENGTH, b"\0")] for caption in captions])
