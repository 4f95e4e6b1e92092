"""The kernels' text, .cu files and the .cuh files that they include."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from . import Unavailable

# A distribution has the files in the package, where setup.py puts them; a source tree has them in csrc/cuda.
FOLDERS = (Path(__file__).parent / "csrc", Path(__file__).parents[3] / "csrc" / "cuda")

SUFFIXES = (".cu", ".cuh")


@cache
def texts() -> dict[str, str]:
    """File name to text. Raises Unavailable where there is none."""
    for folder in FOLDERS:
        paths = [path for path in sorted(folder.glob("*")) if path.suffix in SUFFIXES]
        found = {path.name: path.read_text(encoding="utf-8") for path in paths}
        if found:
            return found
    raise Unavailable(f"the text of the CUDA kernels is in none of {', '.join(map(str, FOLDERS))}")


def text(file: str) -> str:
    """Raises ValueError where there is no such .cu file."""
    if file not in texts() or not file.endswith(".cu"):
        raise ValueError(
            f"no kernels in {file!r}; there are {', '.join(name for name in texts() if name.endswith('.cu'))}"
        )
    return texts()[file]


def headers() -> dict[str, str]:
    return {name: content for name, content in texts().items() if name.endswith(".cuh")}
