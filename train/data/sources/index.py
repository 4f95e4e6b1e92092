"""Arrays that are made once and kept in files: every process of a machine maps the same file into its memory.

A file holds the array, one line of JSON about it (what it was made from, its sum, what else its maker noted), and the
sum and length of that line. It is written under another name and renamed, under a lock: of several processes one makes
it, and the others wait. One that is damaged, or was made from something else, is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ... import lock
from ...files import explain, naming, sync_folder
from ...signals import say
from ..record import DataError

FORMAT = 1  # raised whenever what is written changes
WORD_SECONDS = 10.0  # between words while one waits
_MARK = b"SOFTCLIP"
_TAIL = struct.Struct("<32sQ8s")  # of the line: its sum and its length; then the mark
_PIECE = 8 << 20


@dataclass(frozen=True)
class Index:
    """A kept array.

    entries  (n,), read-only
    sha256   of its bytes, in hex
    origin   what it was made from, as plain JSON
    facts    what its maker noted, likewise
    """

    entries: np.ndarray
    sha256: str
    origin: dict[str, Any]
    facts: dict[str, Any]


Append = Callable[[np.ndarray], None]


class Make(Protocol):
    def __call__(self, append: Append, stale: Index | None) -> dict[str, Any]: ...


def obtain(paths: Sequence[Path], dtype: np.dtype[Any], origin: dict[str, Any], make: Make) -> Index:
    """The array that was made from `origin`, kept in the first of `paths` that has it, or made now and kept in the
    first that can be written.

    make(append, stale)  appends the array piece by piece and returns the facts; `stale`: one of another origin that
                         stands in its place

    Raises DataError where no path can be written, and whatever `make` raises but for OSError.
    """
    for path in paths:
        kept = read(path, dtype)
        if kept is not None and kept.origin == origin:
            return kept
    problems = []
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                kept = read(path, dtype)
                if kept is None or kept.origin != origin:  # no other process made it in the meantime
                    _write(path, dtype, origin, partial(make, stale=kept))
                    kept = read(path, dtype)
            if kept is not None:
                return kept
            problems.append(f"what was written to {path} cannot be read")
        except OSError as error:
            problems.append(explain(error))
    raise DataError(f"an index cannot be kept ({'; '.join(problems)}); set data.index to a folder with room for it")


def read(path: Path, dtype: np.dtype[Any]) -> Index | None:
    """The array of a file; None where there is none, or it is damaged or of another format."""
    try:
        with path.open("rb") as file:
            end = file.seek(-_TAIL.size, os.SEEK_END)
            line_sum, length, mark = _TAIL.unpack(file.read())
            if mark != _MARK or not 0 <= length <= end:
                return None
            file.seek(end - length)
            line = file.read(length)
            if hashlib.sha256(line).digest() != line_sum:
                return None
            about = json.loads(line)
            count, sha256 = about["count"], about["sha256"]
            if about["format"] != FORMAT or about["dtype"] != str(dtype) or count * dtype.itemsize != end - length:
                return None
            if _sum(path, end - length) != sha256:
                return None
            return Index(np.memmap(file, dtype, "r", shape=(count,)), sha256, about["origin"], about["facts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _sum(path: Path, size: int) -> str:
    """SHA-256 of the first bytes of a file; pages that are read, not mapped, do not count as the process's memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (piece := file.read(min(size, _PIECE))):
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


def _write(path: Path, dtype: np.dtype[Any], origin: dict[str, Any], make: Callable[[Append], dict[str, Any]]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest, count = hashlib.sha256(), 0
    try:
        with naming(path), scratch.open("wb") as file:

            def append(piece: np.ndarray) -> None:
                nonlocal count
                data = np.ascontiguousarray(piece, dtype).tobytes()
                digest.update(data)
                file.write(data)
                count += len(piece)

            facts = make(append)
            about = {"format": FORMAT, "dtype": str(dtype), "count": count, "sha256": digest.hexdigest()}
            line = json.dumps({**about, "origin": origin, "facts": facts}).encode() + b"\n"
            file.write(line + _TAIL.pack(hashlib.sha256(line).digest(), len(line), _MARK))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of an index. Where the file system has none, two processes may both make it, one for nothing."""
    with path.with_name(f".{path.name}.lock").open("a", encoding="utf-8") as file:
        try:
            if not lock.take(file, WORD_SECONDS):
                say(f"waiting for another process that makes {path}")
                while not lock.take(file, WORD_SECONDS):
                    pass
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # by one that was killed, or it would hold the lock
                left.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in lock.UNKNOWN_TO_THE_FILE_SYSTEM:
                raise
        yield


def places(folder: Path, what: Sequence[str], chosen: str | None) -> list[Path]:
    """Where an index of files in `folder` may be kept, the best place first: the folder that data.index names
    (`chosen`), or else beside the files, where it serves every machine that sees them, and the cache."""
    name = hashlib.sha256(json.dumps(list(what)).encode()).hexdigest()[:12]
    home = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    if chosen is not None:
        return [Path(chosen).expanduser() / f"{home}-{name}.index"]
    base = os.environ.get("SOFTCLIP_DATA")
    cache = Path(base).expanduser() if base else Path.home() / ".cache" / "softclip_kernels"
    return [folder / f"softclip-{name}.index", cache / "index" / f"{home}-{name}.index"]
