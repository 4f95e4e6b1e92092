"""What a kernel of csrc/cuda/ is compiled for in the emulator, and a problem for it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from . import ROOT
from .emulated import TESTS, aligned, build, exact, rounded

KERNELS = ROOT / "csrc" / "cuda"
ROWS = COLUMNS = 128  # of a tile
FLAG_GROUP = 16  # rows that share a flag
LOG2E = 1.4426950408889634
EPSILON = 2.0**-23
# As softclip_kernels/backends/triton/ has them: places of `scalars`, and how far below the largest logit the reference
# of exponentials lies, forward and backward.
MACROS = {"SCALE": 0, "FACTOR": 1, "BOUND": 2, "TEACHER_FACTOR": 3, "TEACHER_BOUND": 4, "FLAG_GROUP": FLAG_GROUP}
HEADROOM = {"forward": 103.87, "backward": 60.0}
TEACHER_RATIO = 0.7  # of the teacher's scale to the student's, where they are not tied

Ranges = tuple[int, int, int, int]  # row_start, row_end, column_start, column_end


@dataclass(frozen=True)
class Specialization:
    """What a kernel is compiled for."""

    kernel: str  # forward, pair (the forward pass with a teacher), backward
    width: int
    stages: int = 3
    half: bool = False
    mirror: bool = False
    tied: bool = False  # of mirrors, which the forward pass always is

    def __str__(self) -> str:
        kinds = ("half",) * self.half + ("mirror",) * self.mirror + ("tied",) * self.tied
        return "-".join((self.kernel, str(self.width), str(self.stages), *kinds))

    @property
    def of_pass(self) -> str:
        return "backward" if self.kernel == "backward" else "forward"

    def build(self, folder: Path, kernels: Path = KERNELS, name: str = "", optimize: bool = True) -> ctypes.CDLL:
        macros = MACROS | {"WIDTH": self.width, "STAGES": self.stages, "HEADROOM": f"{HEADROOM[self.of_pass]}f"}
        macros |= {
            self.of_pass.upper(): 1,
            "PAIR": int(self.kernel == "pair"),
            "MIRROR": int(self.mirror),
            "TIED": int(self.tied),
        }
        macros |= {"HALF": 1} if self.half else {}
        return build(TESTS / "kernels.cpp", folder / f"{name or self}.so", TESTS, kernels, optimize=optimize, **macros)


@dataclass(frozen=True)
class Problem:
    """x (N, D) and y (M, D) as 16 bits, a scale, and every row's positive column, -1 for none; of a super-block.
    With a teacher that has a problem of its own, of which x and y count."""

    x: np.ndarray
    y: np.ndarray
    half: bool
    scale: float
    positive: np.ndarray | None
    ranges: Ranges
    teacher: Problem | None = None

    @classmethod
    def draw(
        cls, n: int, m: int, d: int, scale: float = 14.3, half: bool = False, positives: bool = True,
        ranges: Ranges | None = None, another: int = 0,
    ) -> Problem:  # fmt: skip
        """Rows of norm 1. The larger the scale the less a row looks like its positive, so that others count.
        another: draws other numbers."""
        random = np.random.default_rng((n, m, d, another) if another else (n, m, d))
        x, y = (random.standard_normal((rows, d)) for rows in (n, m))
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        positive = random.integers(0, m, n)
        x = x / np.linalg.norm(x, axis=1, keepdims=True) + min(1.0, 6 / scale) * y[positive]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        if n > 5:
            positive[3] = -1
        column = positive.astype(np.int64) if positives else None
        return cls(rounded(x, half), rounded(y, half), half, scale, column, ranges or (0, n, 0, m))

    def taught(self, mirror: bool) -> Problem:
        """By its own mirror, or by embeddings of the same width."""
        if mirror:
            return replace(self, teacher=replace(self, x=self.y, y=self.x))
        (n, d), m = self.x.shape, len(self.y)
        return replace(self, teacher=Problem.draw(n, m, d, self.scale, self.half, another=1))

    def with_gaps(self, numbers: int) -> Problem:
        """Of rows with so many NaN behind each."""
        x, y = (aligned((len(each), each.shape[1] + numbers)) for each in (self.x, self.y))
        for wide, narrow in ((x, self.x), (y, self.y)):
            wide[...] = 0xFFFF
            wide[:, : narrow.shape[1]] = narrow
        width = self.x.shape[1]
        teacher = self.teacher and self.teacher.with_gaps(numbers)
        return replace(self, x=x[:, :width], y=y[:, :width], teacher=teacher)

    @cached_property
    def dots(self) -> np.ndarray:
        return exact(self.x, self.half) @ exact(self.y, self.half).T

    @cached_property
    def scalars(self) -> np.ndarray:
        factor = self.scale * LOG2E
        bound, teacher_bound = (factor * each._norms for each in (self, self.teacher or self))
        teachers = (TEACHER_RATIO * factor, TEACHER_RATIO * teacher_bound)
        return np.array([self.scale, factor, bound, *teachers, 0, 0, 0], np.float32)

    @property
    def _norms(self) -> float:
        """The largest that a product can be."""
        return float(np.prod([np.linalg.norm(exact(each, self.half), axis=1).max() for each in (self.x, self.y)]))

    @property
    def bound(self) -> float:
        return float(self.scalars[MACROS["BOUND"]])

    def reference(self, kernel: str, teacher: bool = False) -> float:
        return max(float(self.scalars[MACROS["TEACHER_BOUND" if teacher else "BOUND"]]) - HEADROOM[kernel], 0.0)

    def logits(self, teacher: bool = False) -> np.ndarray:
        """In units of log 2."""
        return self.dots * float(self.scalars[MACROS["TEACHER_FACTOR" if teacher else "FACTOR"]])

    @cached_property
    def exponentials(self) -> np.ndarray:
        """Of the forward kernel."""
        return np.exp2(self.logits() - self.reference("forward"))

    def teacher_exponentials(self, tied: bool) -> np.ndarray:
        """Likewise; tied: with the student's scale and reference."""
        assert self.teacher is not None
        factor = float(self.scalars[MACROS["FACTOR" if tied else "TEACHER_FACTOR"]])
        return np.exp2(self.teacher.dots * factor - self.reference("forward", teacher=not tied))

    @property
    def block(self) -> tuple[slice, slice]:
        row_start, row_end, column_start, column_end = self.ranges
        return slice(row_start, row_end), slice(column_start, column_end)

    @property
    def edge(self) -> int:
        """Of a scratch for the super-block, in whole tiles."""
        return -(-max(each.stop - each.start for each in self.block) // 128) * 128


def tiles(ranges: Sequence[int], columns: int = COLUMNS) -> Iterator[tuple[slice, slice, int, int]]:
    """Rows and columns of the tiles of a super-block, each of so many columns, and the tiles' places."""
    row_start, row_end, column_start, column_end = ranges
    down, along = range(row_start, row_end, ROWS), range(column_start, column_end, columns)
    for (i, row), (j, column) in product(enumerate(down), enumerate(along)):
        yield slice(row, min(row + ROWS, row_end)), slice(column, min(column + columns, column_end)), i, j
