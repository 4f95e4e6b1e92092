"""csrc/cuda/softmax_forward_pair.cu in the emulator: sums with a teacher against float64, under many seeds."""

from __future__ import annotations

from dataclasses import fields

import pytest
from helpers.emulated_forward import PairSums, forward_pair, wrong_pair_sums
from helpers.emulated_kernels import LENGTHS, drawn, wrong_sizes
from helpers.emulated_problem import Specialization
from helpers.kernel_mutants import PAIR, PAIR_MIRRORED, runs

SHARED_BYTES = 227 * 1024  # that a block may have
# As in test_softmax_forward.py; by a teacher's embeddings, of which the wide ones are tested with the long ones, or by
# the mirror.
SPECIALIZATIONS = (
    (64, 2, False), (128, 11, True), (320, 4, True), (512, 5, False),
    (64, 12, True, True), (128, 3, False, True), (320, 8, False, True), (512, 5, True, True),
)  # fmt: skip
ALL = [Specialization("pair", *each) for each in SPECIALIZATIONS if each[0] < 320 or len(each) == 4] + [
    pytest.param(Specialization("pair", width, stages, half, *mirror), marks=pytest.mark.long)
    for width, stages, own, *mirror in SPECIALIZATIONS
    for half in (own, not own)
    if half != own or (width >= 320 and not mirror)
]
NAMES = [field.name for field in fields(PairSums)]


@pytest.mark.parametrize("specialization", ALL, ids=str)
def test_sums_are_those_of_float64_for_every_size_and_scale(built, specialization):
    library = built(specialization)
    assert library.shared_bytes() <= SHARED_BYTES
    assert not wrong_sizes(specialization, library)


# On the diagonal, beside it, with an edge of tiles that are cut off on either side or both.
RANGES = ((0, 256, 0, 256), (0, 256, 256, 300), (128, 300, 128, 300), (256, 300, 256, 300), (128, 256, 256, 300))


@pytest.mark.parametrize("specialization", (PAIR, PAIR_MIRRORED), ids=str)
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("blocks", (1, 3))
def test_a_super_block_is_summed_alone(built, specialization, ranges, blocks):
    problem, _ = drawn(specialization, 300, 300, ranges=ranges)
    found = forward_pair(built(specialization), problem, blocks, seed=blocks)
    assert wrong_pair_sums(problem, found, specialization.mirror) is None


@pytest.mark.parametrize("ranges", ((0, 700, 0, 700), (128, 520, 0, 128), (0, 384, 384, 700)))
@pytest.mark.parametrize("specialization", (PAIR, PAIR_MIRRORED), ids=str)
def test_shares_begin_and_end_anywhere(built, specialization, ranges):
    """Up to blocks without a tile."""
    if specialization.mirror and ranges[2] < ranges[0]:
        ranges = (ranges[2], ranges[3], *ranges[:2])  # the library visits one of the two
    problem, _ = drawn(specialization, 700, 700, ranges=ranges)
    for blocks in (2, 3, 4, 5, 7, 11, 13, 23, 30, 47, 60, 71):
        found = forward_pair(built(specialization), problem, blocks, seed=blocks)
        assert wrong_pair_sums(problem, found, specialization.mirror) is None, blocks


@pytest.mark.parametrize("specialization", (PAIR, PAIR_MIRRORED), ids=str)
def test_sums_are_right_under_every_seed(built, specialization):
    assert not [found for found in runs(specialization, built(specialization)) if found is not None]


@pytest.mark.parametrize("specialization", (PAIR, PAIR_MIRRORED), ids=str)
def test_sums_are_the_same_bits_under_every_seed(built, specialization):
    problem, _ = drawn(specialization, 300, 300)
    first, *others = (forward_pair(built(specialization), problem, blocks=2, seed=seed) for seed in range(40))
    for other in others:
        for name in NAMES:
            assert getattr(first, name).tobytes() == getattr(other, name).tobytes()


@pytest.mark.parametrize("specialization", (PAIR, PAIR_MIRRORED), ids=str)
def test_a_gap_between_the_rows_is_not_read(built, specialization):
    problem, _ = drawn(specialization, max(LENGTHS), max(LENGTHS))
    wide = problem.with_gaps(8)
    found, expected = (forward_pair(built(specialization), each, blocks=2, seed=1) for each in (wide, problem))
    for name in NAMES:
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes()
