"""One image-text pair as it lies on disk, and what every source of such pairs offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class DataError(ValueError):
    """Data are missing, malformed or too corrupt; the message says what to do about it."""


class BadRecordError(Exception):
    """A record that must be left out; `args[0]` is the reason it is counted under, a short word such as
    `broken_image`."""


@dataclass(frozen=True)
class Record:
    """One image-text pair.

    key         names it in messages: unique in its source, and without control characters
    image       the bytes of its file (JPEG, PNG or WebP), not decoded
    captions    one or more, cleaned (see captions); the first one is canonical, and the one that it is evaluated by
                where every record has a label
    label       what it shows, as a number: records of one label are the same thing. None where nobody says
    class_name  a coarser class in words, for zero-shot classification; None where nobody says
    noise       0 where the captions are its own, else 1 + the index in options.NOISE of how they were made wrong
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    label: int | None = None
    class_name: str | None = None
    noise: int = 0


class Source(Protocol):
    """Image-text pairs by number, read at random; forked processes may share it, and read at the same time.

    fingerprint  hex SHA-256 of what it holds, wherever it lies: another one means other data
    left_out     records that it lacks because they were bad as soon as it was opened, counted by reason
    """

    fingerprint: str
    left_out: dict[str, int]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """Record number `index`, 0 to len - 1. Raises BadRecordError where it is malformed, DataError where the source
        itself is broken (a file is gone, or was changed since it was opened)."""
        ...

    def labels(self) -> np.ndarray | None:
        """(len,) int64, the label of every record without reading its image; None where not every record has one."""
        ...

    def classes(self) -> np.ndarray | None:
        """(len,) int64, reading.class_number of every record's class name, likewise."""
        ...


def describe_bad(bad: Mapping[str, int]) -> str:
    """Bad records in words, by reason, the most frequent first."""
    reasons = sorted(bad.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{reason} {count}" for reason, count in reasons) or "none"


def count_bad(bad: Mapping[str, int]) -> str:
    """How many there are, and why."""
    return f"{sum(bad.values())} ({describe_bad(bad)})" if bad else "none"
