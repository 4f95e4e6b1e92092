"""What was compiled, in the folder cubins beside the tuner's choices: $XDG_CACHE_HOME/softclip_kernels, or
~/.cache/softclip_kernels.

The folder is a convenience. A file that is missing, damaged or cannot be read or written costs a compilation, never an
error, and deleting any is safe. Processes that write at once leave whole files.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import cache_folder

logger = logging.getLogger("softclip_kernels")

DIGEST = hashlib.sha256().digest_size


def folder() -> Path:
    return cache_folder.folder() / "cubins"


def key(**made_of: Any) -> str:
    """Of all that a cubin is made of, as JSON."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def cubin(key: str, compiled: Callable[[], bytes]) -> bytes:
    """What is kept under the key; otherwise what is compiled now, and kept."""
    try:
        path = folder() / key
    except RuntimeError:  # there is no home
        return compiled()
    content = _read(path)
    if content is None:
        content = compiled()
        _write(path, content)
    return content


def _read(path: Path) -> bytes | None:
    """Without the digest that a file begins with; None where that is of another content."""
    try:
        kept = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.info("CUDA kernels: %s is ignored (%s)", path, error)
        return None
    digest, content = kept[:DIGEST], kept[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        logger.info("CUDA kernels: %s is damaged and ignored", path)
        return None
    return content


def _write(path: Path, content: bytes) -> None:
    try:
        cache_folder.write_whole(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        logger.info("CUDA kernels: %s is not written (%s)", path, error)
