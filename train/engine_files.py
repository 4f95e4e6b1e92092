"""The engine's files of a checkpoint, one for each rank. Reading runs no code: PyTorch's restricted reader builds
tensors and plain values, nothing else."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .files import naming

FORMAT = 1  # of what is in them; see engine_state.save_engine
OF_DEEPSPEED = "*_optim_states.pt"  # in checkpoints of earlier versions


def file_of(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


class _Watched(io.FileIO):
    """Keeps the system's error, which PyTorch's writer may hide behind its own."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


def write(path: Path, content: Any) -> None:
    """Raises OSError, with the path, where the disk does not take it."""
    with naming(path):
        raw = _Watched(path, "w")
        try:
            with io.BufferedWriter(raw) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:
            raise raw.failure or error from None


def read(path: Path, mmap: bool = False) -> Any:
    """On the CPU; with `mmap`, from the disk as it is used. Raises pickle.UnpicklingError where the file asks for
    anything but tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        asked = ", ".join(re.findall(r"GLOBAL ([\w.]+)", str(error))) or "what no optimizer's state holds"
        raise pickle.UnpicklingError(
            f"{path.name} asks for {asked}; only tensors and plain values are read, for anything else could run code"
        ) from None


def why_unusable(folder: Path, processes: int) -> str | None:
    """Why no run can go on from the files of `processes` ranks in `folder`, or None. Reads all of them, one at a
    time."""
    if list(folder.glob(OF_DEEPSPEED)):
        return f"{folder.name}/ holds DeepSpeed's own files: an earlier version wrote it, and can go on from it"
    names = {path.name for path in folder.iterdir()}
    if names != {file_of(rank) for rank in range(processes)}:
        return f"{folder.name}/ holds {len(names)} files, and not one of each of the {processes} ranks"
    for name in sorted(names):
        content = read(folder / name)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return f"{folder.name}/{name} is not of this version"
        if any(not torch.isfinite(tensor).all() for tensor in tensors(content)):
            return f"{folder.name}/{name} holds NaN or infinity"
    return None


def tensors(content: Any) -> Iterator[torch.Tensor]:
    """All floating-point tensors in nested mappings and lists."""
    if isinstance(content, torch.Tensor):
        if content.is_floating_point():
            yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors(part)
