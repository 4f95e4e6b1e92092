"""C++ of tests/cuda/ and the kernels of csrc/cuda/, built by g++ with the emulator and called with arrays."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from . import ROOT

TESTS = ROOT / "tests" / "cuda"
KERNELS = ROOT / "csrc" / "cuda"
# No symbol is shared by two libraries of a process: they are compiled for different dtypes and widths.
COMPILER = (
    "g++", "-O2", "-fno-gnu-unique", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi", "-shared", "-fPIC",
)  # fmt: skip
MESSAGE = 1 << 16
ROWS = COLUMNS = 128  # of a tile
LOG2E = 1.4426950408889634
# As softclip_kernels/backends/triton/ has them: places of `scalars`; how far below the largest logit the reference of
# exponentials lies, forward and backward; how many rows share a flag.
MACROS = {"SCALE": "0", "FACTOR": "1", "BOUND": "2", "FLAG_GROUP": "16"}
HEADROOM = {"forward": 103.87, "backward": 60.0}
FLAG_GROUP = 16


class EmulatorError(Exception):
    """What the emulator found wrong."""


def build(source: Path, output: Path, *folders: Path, **macros: str) -> ctypes.CDLL:
    output.parent.mkdir(parents=True, exist_ok=True)
    options = [f"-D{name}={value}" for name, value in macros.items()]
    options += [f"-I{folder}" for folder in folders]
    subprocess.run([*COMPILER, *options, str(source), "-o", str(output)], check=True)
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
    array: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        size = int(np.prod(self.shape))
        self.around = aligned((size + 2 * 64,), self.dtype)
        self.around.view(np.uint8)[...] = 0xFF  # NaN in every dtype
        self.array = self.around[64 : 64 + size].reshape(self.shape)

    def check(self) -> np.ndarray:
        for side in (self.around[:64], self.around[-64:]):
            assert np.all(side.view(np.uint8) == 0xFF), "written beyond an array's ends"
        return self.array


@dataclass(frozen=True)
class Problem:
    """x (N, D) and y (M, D) as 16 bits, a scale, and every row's positive column, -1 for none; of a super-block."""

    x: np.ndarray
    y: np.ndarray
    half: bool
    scale: float
    positive: np.ndarray | None
    ranges: tuple[int, int, int, int]  # row_start, row_end, column_start, column_end

    @classmethod
    def draw(
        cls, n: int, m: int, d: int, scale: float = 14.3, half: bool = False, positives: bool = True, seed: int = 0,
        ranges: tuple[int, int, int, int] | None = None,
    ) -> Problem:  # fmt: skip
        """Rows of norm 1. The larger the scale the less a row looks like its positive, so that others count."""
        random = np.random.default_rng((seed, n, m, d))
        x, y = (random.standard_normal((rows, d)) for rows in (n, m))
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        positive = random.integers(0, m, n)
        x = x / np.linalg.norm(x, axis=1, keepdims=True) + min(1.0, 6 / scale) * y[positive]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        if n > 5:
            positive[3] = -1
        positive = positive.astype(np.int64) if positives else None
        return cls(rounded(x, half), rounded(y, half), half, scale, positive, ranges or (0, n, 0, m))

    @cached_property
    def dots(self) -> np.ndarray:
        return exact(self.x, self.half) @ exact(self.y, self.half).T

    @cached_property
    def scalars(self) -> np.ndarray:
        norms = [np.linalg.norm(exact(each, self.half), axis=1).max() for each in (self.x, self.y)]
        numbers = np.zeros(8, np.float32)
        numbers[:3] = self.scale, self.scale * LOG2E, self.scale * norms[0] * norms[1] * LOG2E
        return numbers

    def reference(self, kernel: str) -> float:
        return max(float(self.scalars[2]) - HEADROOM[kernel], 0.0)

    @cached_property
    def logits(self) -> np.ndarray:
        """In units of log 2."""
        return self.dots * float(self.scalars[1])

    @cached_property
    def exponentials(self) -> np.ndarray:
        """Of the forward kernel."""
        return np.exp2(self.logits - self.reference("forward"))


@dataclass(frozen=True)
class Specialization:
    width: int
    cluster: int = 1
    stages: int = 4
    half: bool = False

    def __str__(self) -> str:
        return f"{self.width}x{self.cluster}x{self.stages}{'h' if self.half else 'b'}"

    def build(self, kernel: str, output: Path, kernels: Path = KERNELS) -> ctypes.CDLL:
        macros = MACROS | {"WIDTH": str(self.width), "CLUSTER": str(self.cluster), "STAGES": str(self.stages)}
        macros |= {kernel.upper(): "1", "HEADROOM": f"{HEADROOM[kernel]}f"} | ({"HALF": "1"} if self.half else {})
        return build(TESTS / "kernels.cpp", output, TESTS, kernels, **macros)


def tiles(ranges: Sequence[int]) -> Iterator[tuple[slice, slice, int, int]]:
    """Rows and columns of the tiles of a super-block, and the tiles' places."""
    row_start, row_end, column_start, column_end = ranges
    down, along = range(row_start, row_end, ROWS), range(column_start, column_end, COLUMNS)
    for (i, row), (j, column) in product(enumerate(down), enumerate(along)):
        yield slice(row, min(row + ROWS, row_end)), slice(column, min(column + COLUMNS, column_end)), i, j


# The forward kernel.


@dataclass(frozen=True)
class Sums:
    rows: np.ndarray  # (tile columns, edge)
    columns: np.ndarray  # (tile rows, edge)
    positive_logit: np.ndarray


def forward(library: ctypes.CDLL, problem: Problem, blocks: int, seed: int) -> Sums:
    row_start, row_end, column_start, column_end = problem.ranges
    height, width = row_end - row_start, column_end - column_start
    edge = -(-max(height, width) // 128) * 128
    rows, columns = Fenced((-(-width // COLUMNS), edge)), Fenced((-(-height // ROWS), edge))
    logits = Fenced((len(problem.x),))
    call(
        library.forward, ctypes.c_uint64(seed), blocks, ctypes.byref(Matrix.of(problem.x)),
        ctypes.byref(Matrix.of(problem.y)), problem.positive, problem.scalars, rows.array, columns.array, logits.array,
        (ctypes.c_int * 4)(*problem.ranges), edge,
    )  # fmt: skip
    return Sums(rows.check(), columns.check(), logits.check())


def wrong_sums(problem: Problem, found: Sums) -> str | None:
    """What differs from float64. An exponential's relative error is its exponent's error: that is 2^-23 of the largest
    exponent by rounding, and as much by the dot's sum, both several times over."""
    tolerance = 4 * 2.0**-23 * (float(problem.scalars[2]) + 4)
    e = problem.exponentials
    row_start, row_end, column_start, column_end = problem.ranges
    for i, j, down, along in tiles(problem.ranges):
        within = slice(down * ROWS, down * ROWS + i.stop - i.start)
        if not np.allclose(found.rows[along, within], e[i, j].sum(1), rtol=tolerance, atol=0):
            return f"sums of rows of tile {down}, {along}"
    height, width = row_end - row_start, column_end - column_start
    if not np.all(np.isnan(found.rows[:, height:])) or not np.all(np.isnan(found.columns[:, width:])):
        return "a slot of no row or column is written"
    sums = found.columns[:, :width].astype(np.float64).sum(0)
    if not np.allclose(sums, e[row_start:row_end, column_start:column_end].sum(0), rtol=tolerance, atol=0):
        return "sums of columns"
    expected = np.full(len(problem.x), np.nan)
    if problem.positive is not None:
        for row in range(row_start, row_end):
            if column_start <= problem.positive[row] < column_end:
                expected[row] = problem.scale * problem.dots[row, problem.positive[row]]
    if not np.allclose(found.positive_logit, expected, rtol=1e-5, atol=4e-7 * problem.scale, equal_nan=True):
        return "logits of positives"
    return None


# The backward kernel.


@dataclass(frozen=True)
class Direction:
    """Coefficients a_i (or b_j), signed exponents, and which groups of FLAG_GROUP are in range."""

    coefficient: np.ndarray
    exponent: np.ndarray
    in_range: np.ndarray


def direction(problem: Problem, axis: int, seed: int = 0, out_of_range: float = 0.0) -> Direction:
    """Of gradients of either sign, as coefficients.py makes them; so many of the groups are said to be out of range."""
    random = np.random.default_rng((seed, axis))
    lse = np.log2(np.exp2(problem.logits).sum(axis))
    grad = random.standard_normal(len(lse)) / len(lse)
    grad[random.random(len(lse)) < 0.05] = 0
    power = problem.reference("backward") - lse
    usable = (-100 < power) & (power < 80)
    with np.errstate(divide="ignore"):
        exponent = np.minimum(lse - np.log2(np.abs(grad)), 3e38).astype(np.float32)
    bits = exponent.view(np.int32) & -2 | (grad < 0)
    groups = range(0, len(lse), FLAG_GROUP)
    in_range = np.array([usable[i : i + FLAG_GROUP].all() and random.random() >= out_of_range for i in groups], np.int8)
    usable = np.repeat(in_range, FLAG_GROUP)[: len(lse)] != 0
    coefficient = np.where(usable, grad * np.exp2(np.minimum(power, 80)), np.inf).astype(np.float32)
    return Direction(coefficient, bits.astype(np.int32).view(np.float32), in_range)


def backward(
    library: ctypes.CDLL, problem: Problem, rows: Direction, columns: Direction, blocks: int, seed: int
) -> np.ndarray:
    """The scratch (edge, edge) as 16 bits, NaN where nothing was written."""
    row_start, row_end, column_start, column_end = problem.ranges
    edge = -(-max(row_end - row_start, column_end - column_start) // 128) * 128
    g = Fenced((edge, edge), np.uint16)
    call(
        library.backward, ctypes.c_uint64(seed), blocks, ctypes.byref(Matrix.of(problem.x)),
        ctypes.byref(Matrix.of(problem.y)), ctypes.byref(Matrix.of(g.array)), problem.positive, rows.coefficient,
        rows.in_range, columns.coefficient, columns.in_range, rows.exponent, columns.exponent, problem.scalars,
        (ctypes.c_int * 4)(*problem.ranges),
    )  # fmt: skip
    return g.check()


def through(problem: Problem, of: Direction, axis: int) -> np.ndarray:
    """The gradient of every logit through the softmaxes along one direction."""
    shape = (-1, 1) if axis == 1 else (1, -1)
    exponent = of.exponent.reshape(shape)
    sign = np.where(exponent.view(np.int32) & 1, -1.0, 1.0)
    return sign * np.exp2(problem.logits - exponent.astype(np.float64))


def wrong_entries(
    problem: Problem, rows: Direction, columns: Direction, found: np.ndarray, cluster: int = 1
) -> str | None:
    """What differs from float64: an entry's two parts each by their exponents' errors, their sum by its rounding."""
    parts = (through(problem, rows, 1), through(problem, columns, 0))
    expected = parts[0] + parts[1]
    size = np.abs(parts[0]) + np.abs(parts[1])
    if problem.positive is not None:
        has = np.flatnonzero(problem.positive >= 0)
        expected[has, problem.positive[has]] = 0
    ulp, smallest = (2.0**-11, 2.0**-25) if problem.half else (2.0**-8, 0.0)
    tolerance = 8 * 2.0**-23 * (float(problem.scalars[2]) + np.abs(np.minimum(rows.exponent, 1e3)).max() + 4)
    row_start, row_end, column_start, column_end = problem.ranges
    height, width = row_end - row_start, column_end - column_start
    entries = exact(found, problem.half)
    block = slice(row_start, row_end), slice(column_start, column_end)
    error = np.abs(entries[:height, :width] - expected[block])
    if not np.all(error <= (ulp * np.abs(expected) + tolerance * size)[block] + smallest + 2.0**-130):
        return "entries of G"
    panels = cluster * COLUMNS
    down, along = -(-height // ROWS) * ROWS, -(-width // panels) * panels
    if not np.all(np.isnan(entries[down:])) or not np.all(np.isnan(entries[:, along:])):
        return "G is written beyond the tiles of the super-block"
    return None
