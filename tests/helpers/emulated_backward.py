"""The backward kernel of csrc/cuda/ in the emulator: its vectors, calls, and what is wrong with G, against float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import product

import numpy as np

from .emulated import Fenced, Matrix, call, exact, rounded
from .emulated_problem import EPSILON, FLAG_GROUP, Problem

STORE, ADD = range(2)  # enum Put


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
