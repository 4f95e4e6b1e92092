"""The kernels of csrc/cuda/ in the emulator: problems, calls, and what is wrong with a result, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from . import ROOT
from .emulated import TESTS, Fenced, Matrix, aligned, build, call, exact, rounded

KERNELS = ROOT / "csrc" / "cuda"
ROWS = COLUMNS = 128  # of a tile
FLAG_GROUP = 16  # rows that share a flag
LOG2E = 1.4426950408889634
EPSILON = 2.0**-23
# As softclip_kernels/backends/triton/ has them: places of `scalars`, and how far below the largest logit the reference
# of exponentials lies, forward and backward.
MACROS = {"SCALE": 0, "FACTOR": 1, "BOUND": 2, "TEACHER_FACTOR": 3, "TEACHER_BOUND": 4, "FLAG_GROUP": FLAG_GROUP}
HEADROOM = {"forward": 103.87, "backward": 60.0}
STORE, ADD = range(2)  # enum Put
TEACHER_RATIO = 0.7  # of the teacher's scale to the student's, where they are not tied

Ranges = tuple[int, int, int, int]  # row_start, row_end, column_start, column_end


@dataclass(frozen=True)
class Specialization:
    """What a kernel is compiled for; the last two are the backward kernel's."""

    kernel: str  # forward, backward
    width: int
    stages: int = 3
    half: bool = False
    mirror: bool = False
    tied: bool = False

    def __str__(self) -> str:
        kinds = ("half",) * self.half + ("mirror",) * self.mirror + ("tied",) * self.tied
        return "-".join((self.kernel, str(self.width), str(self.stages), *kinds))

    def build(self, folder: Path, kernels: Path = KERNELS, name: str = "") -> ctypes.CDLL:
        macros = MACROS | {"WIDTH": self.width, "STAGES": self.stages, "HEADROOM": f"{HEADROOM[self.kernel]}f"}
        macros |= {self.kernel.upper(): 1, "PAIR": 0, "MIRROR": int(self.mirror), "TIED": int(self.tied)}
        macros |= {"HALF": 1} if self.half else {}
        return build(TESTS / "kernels.cpp", folder / f"{name or self}.so", TESTS, kernels, **macros)


@dataclass(frozen=True)
class Problem:
    """x (N, D) and y (M, D) as 16 bits, a scale, and every row's positive column, -1 for none; of a super-block."""

    x: np.ndarray
    y: np.ndarray
    half: bool
    scale: float
    positive: np.ndarray | None
    ranges: Ranges

    @classmethod
    def draw(
        cls, n: int, m: int, d: int, scale: float = 14.3, half: bool = False, positives: bool = True,
        ranges: Ranges | None = None,
    ) -> Problem:  # fmt: skip
        """Rows of norm 1. The larger the scale the less a row looks like its positive, so that others count."""
        random = np.random.default_rng((n, m, d))
        x, y = (random.standard_normal((rows, d)) for rows in (n, m))
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        positive = random.integers(0, m, n)
        x = x / np.linalg.norm(x, axis=1, keepdims=True) + min(1.0, 6 / scale) * y[positive]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        if n > 5:
            positive[3] = -1
        column = positive.astype(np.int64) if positives else None
        return cls(rounded(x, half), rounded(y, half), half, scale, column, ranges or (0, n, 0, m))

    def with_gaps(self, numbers: int) -> Problem:
        """Of rows with so many NaN behind each."""
        x, y = (aligned((len(each), each.shape[1] + numbers)) for each in (self.x, self.y))
        for wide, narrow in ((x, self.x), (y, self.y)):
            wide[...] = 0xFFFF
            wide[:, : narrow.shape[1]] = narrow
        width = self.x.shape[1]
        return replace(self, x=x[:, :width], y=y[:, :width])

    @cached_property
    def dots(self) -> np.ndarray:
        return exact(self.x, self.half) @ exact(self.y, self.half).T

    @cached_property
    def scalars(self) -> np.ndarray:
        norms = [np.linalg.norm(exact(each, self.half), axis=1).max() for each in (self.x, self.y)]
        factor = self.scale * LOG2E
        bound = factor * norms[0] * norms[1]
        return np.array([self.scale, factor, bound, TEACHER_RATIO * factor, TEACHER_RATIO * bound, 0, 0, 0], np.float32)

    @property
    def bound(self) -> float:
        return float(self.scalars[MACROS["BOUND"]])

    def reference(self, kernel: str, teacher: bool = False) -> float:
        return max((TEACHER_RATIO if teacher else 1) * self.bound - HEADROOM[kernel], 0.0)

    def logits(self, teacher: bool = False) -> np.ndarray:
        """In units of log 2."""
        return self.dots * float(self.scalars[MACROS["TEACHER_FACTOR" if teacher else "FACTOR"]])

    @cached_property
    def exponentials(self) -> np.ndarray:
        """Of the forward kernel."""
        return np.exp2(self.logits() - self.reference("forward"))

    @property
    def block(self) -> tuple[slice, slice]:
        row_start, row_end, column_start, column_end = self.ranges
        return slice(row_start, row_end), slice(column_start, column_end)

    @property
    def edge(self) -> int:
        """Of a scratch for the super-block, in whole tiles."""
        return -(-max(each.stop - each.start for each in self.block) // 128) * 128


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
    """By so many blocks. What nothing is written to is NaN."""
    height, width = (each.stop - each.start for each in problem.block)
    rows, columns = Fenced((-(-width // COLUMNS), problem.edge)), Fenced((-(-height // ROWS), problem.edge))
    logits = Fenced((len(problem.x),))
    call(
        library.forward, ctypes.c_uint64(seed), blocks, ctypes.byref(Matrix.of(problem.x)),
        ctypes.byref(Matrix.of(problem.y)), problem.positive, problem.scalars, rows.array, columns.array, logits.array,
        (ctypes.c_int * 4)(*problem.ranges), problem.edge,
    )  # fmt: skip
    return Sums(rows.check(), columns.check(), logits.check())


def wrong_sums(problem: Problem, found: Sums) -> str | None:
    """What differs from float64. An exponential's relative error is its exponent's error: EPSILON of the largest one by
    rounding, and as much by the dot's sum, both several times over."""
    tolerance = 4 * EPSILON * (problem.bound + 4)
    e = problem.exponentials
    for i, j, down, along in tiles(problem.ranges):
        within = slice(down * ROWS, down * ROWS + i.stop - i.start)
        if not np.allclose(found.rows[along, within], e[i, j].sum(1), rtol=tolerance, atol=0):
            return f"sums of rows of tile {down}, {along}"
    height, width = (each.stop - each.start for each in problem.block)
    if not np.all(np.isnan(found.rows[:, height:])) or not np.all(np.isnan(found.columns[:, width:])):
        return "a slot of no row or column is written"
    sums = found.columns[:, :width].astype(np.float64).sum(0)
    if not np.allclose(sums, e[problem.block].sum(0), rtol=tolerance, atol=0):
        return "sums of columns"
    expected = np.full(len(problem.x), np.nan)
    if problem.positive is not None:
        rows, columns = problem.block
        for row in range(rows.start, rows.stop):
            if columns.start <= problem.positive[row] < columns.stop:
                expected[row] = problem.scale * problem.dots[row, problem.positive[row]]
    if not np.allclose(found.positive_logit, expected, rtol=1e-5, atol=4e-7 * problem.scale, equal_nan=True):
        return "logits of positives"
    return None


# The backward kernel.


@dataclass(frozen=True)
class Vectors:
    """What the exponentials of a tile's rows (columns) are multiplied with, where in range; and for where they are not,
    exponents that are signed by their last bit."""

    coefficient: np.ndarray
    exponent: np.ndarray


@dataclass(frozen=True)
class Gradient:
    """Of a problem's rows and columns: of a tile's own part, and of the part that it brings to its mirror."""

    rows: tuple[Vectors, Vectors]
    columns: tuple[Vectors, Vectors]
    row_in_range: np.ndarray
    column_in_range: np.ndarray
    teacher: bool  # the mirror's logits have a factor of their own

    @classmethod
    def draw(cls, problem: Problem, out_of_range: float = 0.0, mirror: bool = False, tied: bool = False) -> Gradient:
        """As coefficients.py makes them, of gradients of either sign. So many of the groups are called out of range
        beside those that are. mirror: for a square problem, whose flags hold for rows and columns alike."""
        random = np.random.default_rng((len(problem.x), int(problem.scale)))
        teacher = mirror and not tied
        drawn = {}
        for of_teacher, axis in product((False, teacher), (1, 0)):
            lse = np.log2(np.exp2(problem.logits(of_teacher)).sum(axis))
            grad = random.standard_normal(len(lse)) / len(lse)
            grad[random.random(len(lse)) < 0.05] = 0
            drawn[of_teacher, axis] = (grad, problem.reference("backward", of_teacher) - lse, lse)
        flags = {}
        for axis in (1, 0):
            # A row of the tile is a column of the mirror, whose flags are the columns'.
            powers = [drawn[False, axis][1]] + ([drawn[teacher, 1 - axis][1]] if mirror else [])
            usable = np.all([(power > -100) & (power < 80) for power in powers], axis=0)
            groups = range(0, len(usable), FLAG_GROUP)
            flags[axis] = np.array(
                [usable[i : i + FLAG_GROUP].all() and random.random() >= out_of_range for i in groups], np.int8
            )

        def vectors(of_teacher: bool, axis: int, flags: np.ndarray) -> Vectors:
            grad, power, lse = drawn[of_teacher, axis]
            good = np.repeat(flags, FLAG_GROUP)[: len(lse)] != 0
            coefficient = np.where(good, grad * np.exp2(np.minimum(power, 80)), np.inf).astype(np.float32)
            with np.errstate(divide="ignore"):
                exponent = np.minimum(lse - np.log2(np.abs(grad)), 3e38).astype(np.float32)
            return Vectors(coefficient, (exponent.view(np.int32) & -2 | (grad < 0)).astype(np.int32).view(np.float32))

        rows, columns = (
            (vectors(False, axis, flags[axis]), vectors(teacher, axis, flags[1 - axis] if mirror else flags[axis]))
            for axis in (1, 0)
        )
        return cls(rows, columns, flags[1], flags[0], teacher)


def scratch(problem: Problem, drawn: bool = False) -> Fenced:
    """(edge, edge) for a block of G, of numbers or else of NaN."""
    found = Fenced((problem.edge, problem.edge), np.uint16)
    if drawn:
        numbers = np.random.default_rng(0).standard_normal(found.shape)
        found.array[...] = rounded(numbers / problem.edge, problem.half)
    return found


def backward(
    library: ctypes.CDLL, problem: Problem, gradient: Gradient, blocks: int, seed: int, g: np.ndarray,
    mirror_g: np.ndarray, put: tuple[int, int] = (STORE, STORE),
) -> None:  # fmt: skip
    """By so many blocks: the tiles' own parts to g, and what they bring to their mirrors to mirror_g."""
    vectors = []
    for side, in_range in ((gradient.rows, gradient.row_in_range), (gradient.columns, gradient.column_in_range)):
        vectors += [side[0].coefficient, side[0].exponent, in_range]
    for side in (gradient.rows, gradient.columns):
        vectors += [side[1].coefficient, side[1].exponent]
    call(
        library.backward, ctypes.c_uint64(seed), blocks, ctypes.byref(Matrix.of(problem.x)),
        ctypes.byref(Matrix.of(problem.y)), ctypes.byref(Matrix.of(g)), ctypes.byref(Matrix.of(mirror_g)),
        problem.positive, problem.scalars, *vectors, *put, (ctypes.c_int * 4)(*problem.ranges),
    )  # fmt: skip


def _through(logits: np.ndarray, vectors: Vectors, axis: int) -> np.ndarray:
    """The gradient of every logit through the softmaxes along one direction."""
    exponent = vectors.exponent.reshape((-1, 1) if axis == 1 else (1, -1))
    sign = np.where(exponent.view(np.int32) & 1, -1.0, 1.0)
    return sign * np.exp2(logits - exponent.astype(np.float64))


def wrong_entries(
    problem: Problem, gradient: Gradient, found: np.ndarray, mirror: bool = False, before: np.ndarray | None = None
) -> str | None:
    """What differs from float64 in a scratch that held `before`: an entry's two summands each by their exponents'
    errors, and the entry, and what it is added to, by rounding. An exponential below 2^-126 is 0."""
    rows, columns = gradient.rows[mirror], gradient.columns[mirror]
    logits = problem.logits(mirror and gradient.teacher)
    summands = (_through(logits, rows, 1), _through(logits, columns, 0))
    expected, size = summands[0] + summands[1], np.abs(summands[0]) + np.abs(summands[1])
    exponents = max(np.abs(np.minimum(each.exponent, 1e3)).max() for each in (rows, columns))
    lost = [np.abs(np.nan_to_num(each.coefficient, posinf=1).astype(np.float64)) for each in (rows, columns)]
    allowed = 8 * EPSILON * (problem.bound + exponents + 4) * size + 2.0**-126 * (lost[0][:, None] + lost[1] + 1)
    if problem.positive is not None:
        i = np.flatnonzero(problem.positive >= 0)
        j = problem.positive[i]
        if mirror:  # at row j of the mirror, column i
            i, j = j, i
        expected[i, j] = 0
        allowed[i, j] = 0
    expected, allowed = expected[problem.block], allowed[problem.block]
    if mirror:
        expected, allowed = expected.T, allowed.T
    ulp, smallest = (2.0**-11, 2.0**-25) if problem.half else (2.0**-8, 0.0)
    allowed = allowed + ulp * np.abs(expected) + smallest
    height, width = expected.shape
    entries = exact(found, problem.half)
    if before is not None:
        expected = expected + exact(before, problem.half)[:height, :width]
        allowed = allowed + ulp * (np.abs(expected) + allowed) + smallest
    if not np.all(np.abs(entries[:height, :width] - expected) <= allowed):
        return f"entries of G{', the mirror' if mirror else ''}"
    down, along = (-(-length // 128) * 128 for length in (height, width))
    beyond = found.copy()
    beyond[:down, :along] = 0xFFFF if before is None else before[:down, :along]
    if not np.array_equal(beyond, np.full_like(found, 0xFFFF) if before is None else before):
        return "G is written beyond the tiles of the super-block"
    return None


def wrong(
    specialization: Specialization, library: ctypes.CDLL, problem: Problem, gradient: Gradient | None, blocks: int,
    seed: int,
) -> str | None:  # fmt: skip
    """What is wrong with a launch under a seed; gradient: for the backward kernel."""
    if gradient is None:
        return wrong_sums(problem, forward(library, problem, blocks, seed))
    puts = ((STORE, STORE), (ADD, ADD), (STORE, ADD), (ADD, STORE)) if specialization.mirror else ((STORE,), (ADD,))
    put = puts[seed // 3 % len(puts)]
    scratches = [scratch(problem, drawn=each == ADD) for each in put]
    before = [each.array.copy() for each in scratches]
    backward(library, problem, gradient, blocks, seed, scratches[0].array, scratches[-1].array, (put[0], put[-1]))
    for mirror, (each, held, how) in enumerate(zip(scratches, before, put, strict=True)):
        what = wrong_entries(problem, gradient, each.check(), bool(mirror), held if how == ADD else None)
        if what is not None:
            return what
    return None


LENGTHS = (1, 63, 64, 65, 127, 129, 300, 700)
SCALES = (1.0, 14.3, 100.0)


def wrong_sizes(specialization: Specialization, library: ctypes.CDLL) -> list[object]:
    """What is wrong over all lengths of rows and columns (the same for mirrors) and all scales, each under one seed,
    with one to four blocks, some with groups that are out of range."""
    found = []
    for case, (n, m, scale) in enumerate(product(LENGTHS, LENGTHS, SCALES)):
        if specialization.mirror and n != m:
            continue
        problem = Problem.draw(n, m, specialization.width, scale, specialization.half, positives=case % 5 != 4)
        gradient = None
        if specialization.kernel == "backward":
            gradient = Gradient.draw(problem, 0.1 * (case % 2), specialization.mirror, specialization.tied)
        what = wrong(specialization, library, problem, gradient, 1 + case % 4, case)
        if what is not None:
            found.append((n, m, scale, what))
    return found
