"""C++ that runs in the emulator of tests/cuda/, built by g++ and called with arrays."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import ROOT

TESTS = ROOT / "tests" / "cuda"
# No symbol is shared by two libraries of a process: they are compiled for different dtypes and widths.
COMPILER = (
    "g++", "-O2", "-std=c++17", "-fPIC", "-fno-gnu-unique",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi",
)  # fmt: skip
MESSAGE = 1 << 16


class EmulatorError(Exception):
    """What the emulator found wrong."""


def build(source: Path, output: Path, *folders: Path, optimize: bool = True, **macros: str | int) -> ctypes.CDLL:
    """A library of one source and the emulator, whose object lies beside it for the next one. output: another for each,
    because a library that is loaded already is not read again. optimize: the source, which is sooner built without."""
    half = ["-DHALF"] * ("HALF" in macros)
    emulator = output.parent / f"emulator{'-half' * len(half)}.o"
    if not emulator.exists():
        subprocess.run([*COMPILER, *half, "-c", str(TESTS / "emulator.cpp"), "-o", str(emulator)], check=True)
    options = ["-O0"] * (not optimize) + [f"-D{name}={value}" for name, value in macros.items()]
    options += [f"-I{folder}" for folder in folders]
    subprocess.run([*COMPILER, *options, "-shared", str(source), str(emulator), "-o", str(output)], check=True)
    return ctypes.CDLL(str(output))


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def call(function: ctypes._CFuncPtr, *arguments: object) -> None:
    message = ctypes.create_string_buffer(MESSAGE)
    passed = [pointer(each) if each is None or isinstance(each, np.ndarray) else each for each in arguments]
    if function(*passed, message, ctypes.c_uint64(MESSAGE)):
        raise EmulatorError(message.value.decode())


def aligned(shape: tuple[int, ...], dtype: type = np.uint16) -> np.ndarray:
    """Zeros whose address is a multiple of 128."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 128, np.uint8)
    start = -raw.ctypes.data % 128
    return raw[start : start + size].view(dtype).reshape(shape)


def rounded(numbers: np.ndarray, half: bool = False) -> np.ndarray:
    """To bfloat16, or float16, to nearest with ties to even, as 16 bits."""
    found = aligned(numbers.shape)
    if half:
        found[...] = np.asarray(numbers, np.float32).astype(np.float16).view(np.uint16)
    else:
        bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32).astype(np.uint64)
        found[...] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return found


def exact(bits: np.ndarray, half: bool = False) -> np.ndarray:
    """What 16 bits stand for, in float64."""
    if half:
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Matrix(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p), ("columns", ctypes.c_uint64), ("rows", ctypes.c_uint64), ("step", ctypes.c_uint64),
    )  # fmt: skip

    @classmethod
    def of(cls, array: np.ndarray) -> Matrix:
        return cls(array.ctypes.data, array.shape[1], array.shape[0], array.strides[0])


@dataclass
class Fenced:
    """An array whose neighbours in memory nobody may write to."""

    shape: tuple[int, ...]
    dtype: type = np.float32
    fence: int = 64  # so many on either side
    array: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        size = int(np.prod(self.shape))
        self.around = aligned((size + 2 * self.fence,), self.dtype)
        self.around.view(np.uint8)[...] = 0xFF  # NaN in every dtype
        self.array = self.around[self.fence : self.fence + size].reshape(self.shape)

    def check(self) -> np.ndarray:
        for side in (self.around[: self.fence], self.around[-self.fence :]):
            if not np.all(side.view(np.uint8) == 0xFF):
                raise EmulatorError("an array is written beyond its ends")
        return self.array
