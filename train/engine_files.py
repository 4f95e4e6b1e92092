"""DeepSpeed's own files of a checkpoint. A disk that is full ends no rank while the others wait for it, and reading
runs no code: PyTorch's restricted reader builds tensors, plain values and the few classes named here, nothing else."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from .files import naming

# Besides tensors and plain values, ZeRO 1 and 2 keep these three, and ZeRO 3 the first two. None acts when it is made.
CLASSES = (LossScaler, ZeroStageEnum, fragment_address)
MODEL, OPTIMIZER = "*_model_states.pt", "*_optim_states.pt"


class EngineFiles(TorchCheckpointEngine):
    """Takes the place of DeepSpeed's own in an engine. While it saves, ranks wait for each other: so an error of the
    disk is kept, and `raise_failure` raises it once all are through."""

    def __init__(self) -> None:
        super().__init__()
        self._failure: OSError | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok)
        except OSError as error:
            self._failure = self._failure or error

    def save(self, state_dict: Any, path: str) -> None:
        try:
            write(Path(path), state_dict)
        except OSError as error:
            self._failure = self._failure or error

    def load(self, path: str, map_location: Any = None) -> Any:
        return read(Path(path), map_location)

    def raise_failure(self) -> None:
        """Raise the first error since the last call."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


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


def read(path: Path, map_location: Any = None) -> Any:
    """Raises pickle.UnpicklingError where the file asks for anything but tensors, plain values and CLASSES."""
    try:
        with torch.serialization.safe_globals(list(CLASSES)):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = ", ".join(re.findall(r"GLOBAL ([\w.]+)", str(error))) or "what no optimizer's state holds"
        raise pickle.UnpicklingError(
            f"{path.name} asks for {asked}; only tensors, plain values and "
            f"{', '.join(kind.__name__ for kind in CLASSES)} are read, for anything else could run code"
        ) from None


def why_unusable(folder: Path, processes: int) -> str | None:
    """Why the engine of `processes` ranks cannot go on from the files in `folder`, or None. Reads all of them, one at a
    time: DeepSpeed would leave out a missing part without a word."""
    optimizers = sorted(folder.glob(OPTIMIZER))
    if len(optimizers) != processes or not list(folder.glob(MODEL)):
        return f"{folder.name}/ lacks files of some of the {processes} ranks"
    for path in sorted(folder.iterdir()):
        if any(not torch.isfinite(tensor).all() for tensor in tensors(read(path, "cpu"))):
            return f"{folder.name}/{path.name} holds NaN or infinity"
    return None


def tensors(content: Any) -> Iterator[torch.Tensor]:
    """All floating-point tensors in nested mappings and lists."""
    if isinstance(content, torch.Tensor):
        if content.is_floating_point():
            yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors(part)
