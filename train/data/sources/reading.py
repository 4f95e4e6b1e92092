"""How sources read files, and what they have in common: fingerprints, and the count of what they leave out."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import time
import unicodedata
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import heartbeat
from ...files import explain
from ...signals import say
from ..captions import clean
from ..record import BadRecordError, DataError, Record
from .scan import MAX_MEMBER_BYTES

MAX_OPEN_FILES = 128
FINGERPRINT_RECORDS = 64
MAX_LABEL = 2**62
WORD_SECONDS = 10.0  # between words of progress

Stamp = tuple[int, int]  # of a file: its size in bytes, and when it was last written, in nanoseconds since 1970


def stamp_of(path: Path, what: str) -> Stamp:
    """Raises DataError where the path is no plain file that can be read; `what`: its part in the data, in words."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise DataError(f"the {what} {path} is no file; allowed: a plain file")
        with path.open("rb"):
            return status.st_size, status.st_mtime_ns
    except OSError as error:
        raise DataError(
            f"the {what} {path} cannot be read ({error.strerror}); bring it back or leave it out"
        ) from error


class OpenFiles:
    """Files that are read here and there, opened when they are first needed. A forked process goes on with what was
    open: positions are given with every read, so nothing is shared but the files."""

    def __init__(self, paths: Sequence[Path], stamps: Sequence[Stamp]) -> None:
        self._paths, self._stamps = paths, stamps
        self._handles: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, start: int, size: int) -> bytes:
        """`size` bytes of a file. Raises DataError where the file is gone, or is not what it was."""
        try:
            handle = self._open(number)
            data = os.pread(handle, size, start)
            while 0 < len(data) < size and (more := os.pread(handle, size - len(data), start + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"{self._paths[number]} can no longer be read ({explain(error)})") from error
        if len(data) < size:
            raise self.changed(number)
        return data

    def changed(self, number: int) -> DataError:
        return DataError(
            f"{self._paths[number]} was changed since it was indexed; leave data alone while a run reads them, and "
            "start again"
        )

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _open(self, number: int) -> int:
        handle = self._handles.get(number)
        if handle is not None:
            self._handles.move_to_end(number)
            return handle
        handle = os.open(self._paths[number], os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(handle)
        if (status.st_size, status.st_mtime_ns) != self._stamps[number]:
            os.close(handle)
            raise self.changed(number)
        self._handles[number] = handle
        if len(self._handles) > MAX_OPEN_FILES:
            os.close(self._handles.popitem(last=False)[1])
        return handle

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy for a process that is not forked, where these handles mean nothing."""
        return {**self.__dict__, "_handles": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def read_file(path: Path) -> bytes:
    """A whole small file. Raises OSError, or BadRecordError: not_a_file or member_too_large."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait forever
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise BadRecordError("not_a_file")
        if status.st_size > MAX_MEMBER_BYTES:
            raise BadRecordError("member_too_large")
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def fingerprint_of(facts: Iterable[str], count: int, read: Callable[[int], Record]) -> str:
    """Hex SHA-256 of what is known of a source without reading it, and of up to FINGERPRINT_RECORDS of its records."""
    digest = hashlib.sha256()
    for fact in (*facts, str(count)):
        digest.update(hashlib.sha256(fact.encode(errors="surrogateescape")).digest())
    shown = min(count, FINGERPRINT_RECORDS)
    for number in range(shown):
        try:
            record = read(number * count // shown)
            digest.update(hashlib.sha256(record.image).digest())
            digest.update(repr((record.captions, record.label, record.class_name)).encode())
        except BadRecordError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()


def check_left_out(where: str, count: int, left_out: dict[str, int], max_fraction: float) -> None:
    """Raises DataError where nothing is left, or more than the share `max_fraction` was left out."""
    bad = sum(left_out.values())
    found = f"{where} holds {count} pairs, and {bad} that cannot be one"
    if bad:
        found += f" ({', '.join(f'{reason} {number}' for reason, number in Counter(left_out).most_common())})"
    if bad > max_fraction * (count + bad):
        raise DataError(
            f"{found}; at most the share data.max_bad_fraction={max_fraction} may be bad: repair or leave out these "
            "samples, or raise it"
        )
    if not count:
        raise DataError(f"{found}; give one with pictures (data.image_key) and captions (data.text_key)")


def split_suffixes(option: str) -> tuple[str, ...]:
    """Of data.image_key or data.text_key: lower case, without dots, the preferred one first."""
    return tuple(suffix.strip().lower().lstrip(".") for suffix in option.split(";") if suffix.strip())


def check_label(value: Any) -> int | None:
    """A label; None where the value is no whole number. Raises BadRecordError: broken_label."""
    if type(value) is not int:
        return None
    if not 0 <= value < MAX_LABEL:
        raise BadRecordError("broken_label")
    return value


def read_label(text: str | bytes) -> int | None:
    """The label that a text gives. Raises BadRecordError: broken_label."""
    try:
        return check_label(int(text))
    except ValueError as error:
        raise BadRecordError("broken_label") from error


def check_class(value: Any) -> str | None:
    """A class in words; None where the value is none. Raises BadRecordError as captions.clean does."""
    return clean(value) if isinstance(value, str) and value else None


@functools.lru_cache(maxsize=4096)
def class_number(name: str) -> int:
    """Of a class name, the same in every source, as 64 bits with a sign: it takes the place of the name where there are
    millions."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def class_numbers(names: Iterable[Any]) -> np.ndarray | None:
    """(n,) int64, class_number of each as check_class leaves it; None where one is missing."""
    numbers = array("q")
    for at, name in enumerate(names):
        try:
            checked = check_class(name)
        except BadRecordError:
            numbers.append(-1 - at)  # nobody else's; it is left out once it is read
            continue
        if checked is None:
            return None
        numbers.append(class_number(checked))
    return np.frombuffer(numbers, np.int64)


class Progress:
    """Says now and then how far long work is, and each time that this process moves. `total`: None where nobody knows
    it."""

    def __init__(self, what: str, total: int | None) -> None:
        self._words = what if total is None else f"of {total} {what}"
        self._said = time.monotonic()

    def at(self, done: int) -> None:
        heartbeat.tick()
        if time.monotonic() - self._said > WORD_SECONDS:
            self._said = time.monotonic()
            say(f"{done} {self._words}")


def is_plain(name: str) -> bool:
    """Whether a message can hold the name: no control characters, and nothing that UTF-8 cannot write."""
    return not any(unicodedata.category(char) in ("Cc", "Cs") for char in name)


def printable(name: str) -> str:
    """A name for messages, whatever it holds."""
    return "".join(char if is_plain(char) else "?" for char in name)
