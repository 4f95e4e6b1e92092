"""The kernels of csrc/cuda/ in the emulator: a problem drawn, launched, and what is wrong with the result."""

from __future__ import annotations

import ctypes
from itertools import product

from .emulated_backward import ADD, STORE, Gradient, backward, scratch, wrong_entries
from .emulated_forward import forward, forward_pair, wrong_pair_sums, wrong_sums
from .emulated_problem import Problem, Ranges, Specialization


def drawn(
    specialization: Specialization, n: int, m: int, scale: float = 14.3, positives: bool = True,
    out_of_range: float = 0.1, ranges: Ranges | None = None,
) -> tuple[Problem, Gradient | None]:  # fmt: skip
    """With a gradient for the backward kernel, of which so many groups are out of range."""
    problem = Problem.draw(n, m, specialization.width, scale, specialization.half, positives, ranges)
    if specialization.kernel == "backward":
        return problem, Gradient.draw(problem, out_of_range, specialization.mirror, specialization.tied)
    return problem.taught(specialization.mirror) if specialization.kernel == "pair" else problem, None


def wrong(
    specialization: Specialization, library: ctypes.CDLL, problem: Problem, gradient: Gradient | None, blocks: int,
    seed: int,
) -> str | None:  # fmt: skip
    """What is wrong with a launch under a seed."""
    if specialization.kernel == "forward":
        return wrong_sums(problem, forward(library, problem, blocks, seed))
    if specialization.kernel == "pair":
        return wrong_pair_sums(problem, forward_pair(library, problem, blocks, seed), specialization.mirror)
    assert gradient is not None
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
        problem, gradient = drawn(specialization, n, m, scale, case % 5 != 4, 0.1 * (case % 2))
        what = wrong(specialization, library, problem, gradient, 1 + case % 4, case)
        if what is not None:
            found.append((n, m, scale, what))
    return found
