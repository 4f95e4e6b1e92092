"""The forward kernels of csrc/cuda/ in the emulator: calls, and what is wrong with their sums, against float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from .emulated import Fenced, Matrix, call
from .emulated_problem import COLUMNS, EPSILON, ROWS, Problem, tiles


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
    return wrong_positives(problem, found.positive_logit, [problem.block])


def wrong_positives(problem: Problem, found: np.ndarray, blocks: list[tuple[slice, slice]]) -> str | None:
    """Of the positives in the blocks, and of no others."""
    expected = np.full(len(problem.x), np.nan)
    if problem.positive is not None:
        for rows, columns in blocks:
            for row in range(rows.start, rows.stop):
                if columns.start <= problem.positive[row] < columns.stop:
                    expected[row] = problem.scale * problem.dots[row, problem.positive[row]]
    if not np.allclose(found, expected, rtol=1e-5, atol=4e-7 * problem.scale, equal_nan=True):
        return "logits of positives"
    return None


# With a teacher.

PAIR_COLUMNS = 64  # of a tile
STATISTICS = 3  # of a slot: the student's sum, the teacher's, and that of the teacher's times the student's products


@dataclass(frozen=True)
class PairSums:
    rows: np.ndarray  # (tile columns, STATISTICS, edge)
    columns: np.ndarray  # (tile rows, STATISTICS, edge)
    mirror_rows: np.ndarray  # as columns
    mirror_columns: np.ndarray  # as rows
    positive_logit: np.ndarray


def forward_pair(library: ctypes.CDLL, problem: Problem, blocks: int, seed: int) -> PairSums:
    """By so many blocks. What nothing is written to is NaN."""
    height, width = (each.stop - each.start for each in problem.block)
    of_rows, of_columns = -(-width // PAIR_COLUMNS), -(-height // ROWS)
    slot = STATISTICS * problem.edge
    shapes = [(slots, STATISTICS, problem.edge) for slots in (of_rows, of_columns, of_columns, of_rows)]
    sums = [Fenced(shape, fence=4 * slot) for shape in shapes]
    logits, teacher = Fenced((len(problem.x),), fence=4 * ROWS), problem.teacher
    assert teacher is not None
    matrices = [ctypes.byref(Matrix.of(each)) for each in (problem.x, problem.y, teacher.x, teacher.y)]
    call(
        library.forward_pair, ctypes.c_uint64(seed), blocks, *matrices, problem.positive, problem.scalars,
        *(each.array for each in sums), logits.array, (ctypes.c_int * 4)(*problem.ranges), problem.edge,
    )  # fmt: skip
    return PairSums(*(each.check() for each in sums), logits.check())


@dataclass(frozen=True)
class Expected:
    """Slots, NaN where nothing is written, and how far off they may be."""

    sums: np.ndarray
    allowed: np.ndarray

    @classmethod
    def of(
        cls, problem: Problem, student: np.ndarray, teacher: np.ndarray, dots: np.ndarray, axis: int,
        first: int | None,
    ) -> Expected:  # fmt: skip
        """Sums along an axis over every tile, from the exponentials and the student's products. first: 0 where only
        tiles on the diagonal, which are of 128 rows and columns, and right of it are written, and 1 without those on
        it."""
        height, width = (each.stop - each.start for each in problem.block)
        slots = -(-width // PAIR_COLUMNS) if axis == 1 else -(-height // ROWS)
        sums = np.full((slots, STATISTICS, problem.edge), np.nan)
        allowed = sums.copy()
        # As wrong_sums has it; a product by itself is off by some rounding of 1; what is below 2^-126 is 0.
        tolerance = 4 * EPSILON * (problem.bound + 4)
        terms = (student, teacher, teacher * dots)
        errors = [tolerance * np.abs(term) + 2.0**-126 for term in terms]
        errors[2] += 4 * EPSILON * teacher
        for i, j, down, along in tiles(problem.ranges, PAIR_COLUMNS):
            if first is not None and along * PAIR_COLUMNS // ROWS < down + first:
                continue
            slot, start, length = (along, down * ROWS, i) if axis == 1 else (down, along * PAIR_COLUMNS, j)
            where = slice(start, start + length.stop - length.start)
            for s in range(STATISTICS):
                sums[slot, s, where] = terms[s][i, j].sum(axis)
                allowed[slot, s, where] = errors[s][i, j].sum(axis)
        return cls(sums, allowed)

    def wrong(self, found: np.ndarray, together: bool) -> str | None:
        """together: the slots of a position may hold each other's."""
        if not np.array_equal(np.isnan(found), np.isnan(self.sums)):
            return "other slots than those that are read are written, or NaN"
        all_of = [np.nan_to_num(each.astype(np.float64)) for each in (found, self.sums, self.allowed)]
        sums, expected, allowed = (each.sum(0) for each in all_of) if together else all_of
        off = np.abs(sums - expected) > allowed
        return f"of statistics {sorted({int(s) for s in np.nonzero(off)[-2]})}" if off.any() else None


def wrong_pair_sums(problem: Problem, found: PairSums, mirror: bool) -> str | None:
    """What differs from float64: of a tile with student's exponentials e1 and products z1, and teacher's e2 and z2, or
    of its mirror, which has those in the other roles."""
    teacher = problem.teacher
    assert teacher is not None
    exponentials = problem.exponentials, problem.teacher_exponentials(tied=mirror)
    own = (*exponentials, problem.dots)
    others = (*exponentials[::-1], teacher.dots)
    on_diagonal = mirror and problem.ranges[0] == problem.ranges[2]
    nothing = len(problem.x) + len(problem.y)
    for name, terms, axis, first in (
        ("rows", own, 1, 0),
        ("columns", own, 0, 0),
        ("mirror_rows", others, 0, 1),
        ("mirror_columns", others, 1, 1),
    ):
        written = (first if on_diagonal else None) if mirror or terms is own else nothing
        what = Expected.of(problem, *terms, axis, written).wrong(getattr(found, name), together=axis == 0)
        if what is not None:
            return f"{name}: {what}"
    blocks = [problem.block, problem.block[::-1]] if mirror else [problem.block]
    return wrong_positives(problem, found.positive_logit, blocks)
