"""Crash-safe writes (write, flush, rename), errors of the system in words, and hashes of files."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, flush to disk, rename, and flush the folder, which holds the new name."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
    except OSError:  # a full disk above all, on which the scratch file would stay
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a file of a scratch folder that is later flushed and renamed as a whole."""
    with naming(path):
        path.write_bytes(data)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names `path`: the system names no file where a write, not an opening, fails, and a
    scratch file where it is one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def words(error: Exception) -> str:
    """What a user is told of an error."""
    return explain(error) if isinstance(error, OSError) else str(error)


def explain(error: OSError) -> str:
    """An error of the system in words: what, where, and, where the disk is full, how much room is left."""
    if error.filename is None:
        return error.strerror or str(error)
    place = Path(os.fsdecode(error.filename)).absolute()
    text = f"{error.strerror}: {place}"
    folder = next((path for path in (place, *place.parents) if os.path.isdir(path)), None)  # Path.is_dir may raise
    if folder is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return text
    try:
        return f"{text} ({shutil.disk_usage(folder).free / 1e6:.1f} MB free)"
    except OSError:
        return text


def sync_file(path: Path) -> None:
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
