"""Files that are whole or absent, whenever the power goes, and what they hold."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from train import progress


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, flush to disk, rename, and flush the folder, which holds the new name."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:  # a full disk above all, on which the scratch file would stay
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    progress.tick()  # a checkpoint of many files is no hang
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
