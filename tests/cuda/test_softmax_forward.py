"""csrc/cuda/softmax_forward.cu in the emulator: sums and positives' logits against float64, under many seeds."""

from __future__ import annotations

import pytest
from helpers.emulated_forward import forward, wrong_sums
from helpers.emulated_kernels import LENGTHS, wrong_sizes
from helpers.emulated_problem import Problem, Specialization
from helpers.kernel_mutants import FORWARD, runs

SHARED_BYTES = 227 * 1024  # that a block may have
# Every width and every number of stages from the least to as many as fit beside the panel; both dtypes, of which the
# second of a width is tested with the long ones.
SPECIALIZATIONS = ((64, 2, False), (128, 12, True), (320, 4, False), (512, 11, True))
ALL = [Specialization("forward", *each) for each in SPECIALIZATIONS] + [
    pytest.param(Specialization("forward", width, stages, not half), marks=pytest.mark.long)
    for width, stages, half in SPECIALIZATIONS
]


@pytest.mark.parametrize("specialization", ALL, ids=str)
def test_sums_are_those_of_float64_for_every_size_and_scale(built, specialization):
    library = built(specialization)
    assert library.shared_bytes() <= SHARED_BYTES
    assert not wrong_sizes(specialization, library)


@pytest.mark.parametrize("ranges", ((0, 128, 256, 300), (128, 300, 0, 256), (256, 300, 128, 300)))
@pytest.mark.parametrize("blocks", (1, 3))
def test_a_super_block_is_summed_alone(built, ranges, blocks):
    problem = Problem.draw(300, 300, FORWARD.width, ranges=ranges)
    assert wrong_sums(problem, forward(built(FORWARD), problem, blocks, seed=blocks)) is None


def test_sums_are_right_under_every_seed(built):
    assert not [found for found in runs(FORWARD, built(FORWARD)) if found is not None]


def test_sums_are_the_same_bits_under_every_seed(built):
    problem = Problem.draw(300, 300, FORWARD.width)
    first, *others = (forward(built(FORWARD), problem, blocks=2, seed=seed) for seed in range(40))
    for other in others:
        for name in ("rows", "columns", "positive_logit"):
            assert getattr(first, name).tobytes() == getattr(other, name).tobytes()


def test_a_gap_between_the_rows_is_not_read(built):
    problem = Problem.draw(max(LENGTHS), 129, FORWARD.width)
    wide = problem.with_gaps(8)
    found, expected = (forward(built(FORWARD), each, blocks=2, seed=1) for each in (wide, problem))
    assert found.rows.tobytes() == expected.rows.tobytes()
