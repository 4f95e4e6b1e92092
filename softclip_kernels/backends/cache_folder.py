"""The folder of what is kept from process to process, the tuner's choices and compiled CUDA kernels:
$XDG_CACHE_HOME/softclip_kernels or ~/.cache/softclip_kernels. It is a convenience; deleting anything in it is safe."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """Raises RuntimeError where there is no home."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "softclip_kernels"


def write_whole(path: Path, content: bytes) -> None:
    """The file appears at once, so that of processes that write together each leaves a whole one. Raises OSError, and
    then leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=".tmp", delete=False) as file:
            name = file.name
            file.write(content)
        os.replace(name, path)
    except OSError:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise
