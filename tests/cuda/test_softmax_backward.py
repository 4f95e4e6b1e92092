"""csrc/cuda/softmax_backward.cu in the emulator: blocks of G against float64, under many seeds of time."""

from __future__ import annotations

import pytest
from helpers.emulated_backward import Gradient, backward, scratch, wrong_entries
from helpers.emulated_kernels import wrong_sizes
from helpers.emulated_problem import Problem, Specialization
from helpers.kernel_mutants import BACKWARD, MIRRORED, runs

SHARED_BYTES = 227 * 1024  # that a block may have
# As in test_softmax_forward.py; with mirrors, whose teachers have the student's scale or one of their own.
SPECIALIZATIONS = (
    (64, 2, False), (128, 12, True), (320, 4, False), (512, 9, True),
    (64, 12, True, True, True), (128, 3, False, True), (320, 2, True, True), (512, 9, False, True, True),
)  # fmt: skip
ALL = [Specialization("backward", *each) for each in SPECIALIZATIONS] + [
    pytest.param(Specialization("backward", width, stages, not half, *mirror), marks=pytest.mark.long)
    for width, stages, half, *mirror in SPECIALIZATIONS
]


@pytest.mark.parametrize("specialization", ALL, ids=str)
def test_entries_are_those_of_float64_for_every_size_and_scale(built, specialization):
    library = built(specialization)
    assert library.shared_bytes() <= SHARED_BYTES
    assert not wrong_sizes(specialization, library)


@pytest.mark.parametrize("ranges", ((0, 128, 256, 300), (128, 300, 0, 256), (256, 300, 128, 300)))
@pytest.mark.parametrize("blocks", (1, 3))
def test_a_super_block_is_filled_alone(built, ranges, blocks):
    problem = Problem.draw(300, 300, BACKWARD.width, ranges=ranges)
    gradient, g = Gradient.draw(problem, 0.1), scratch(problem)
    backward(built(BACKWARD), problem, gradient, blocks, blocks, g.array, g.array)
    assert wrong_entries(problem, gradient, g.check()) is None


@pytest.mark.parametrize("specialization", (BACKWARD, MIRRORED), ids=str)
def test_entries_are_right_under_every_seed(built, specialization):
    assert not [found for found in runs(specialization, built(specialization)) if found is not None]


def test_entries_are_the_same_bits_under_every_seed(built):
    problem = Problem.draw(300, 300, BACKWARD.width)
    gradient = Gradient.draw(problem, 0.1)
    found = set()
    for seed in range(40):
        g = scratch(problem)
        backward(built(BACKWARD), problem, gradient, 2, seed, g.array, g.array)
        found.add(g.check()[:300, :300].tobytes())
    assert len(found) == 1
