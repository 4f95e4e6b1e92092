"""What each step reads: functions of (seed, step)."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.sampler import StepSampler, batch_indices, permuted
from train.options import ConfigError


def images(sampler: StepSampler, steps: int) -> np.ndarray:
    """The records of so many steps, one after another."""
    return np.concatenate([sampler.draw(step).record for step in range(steps)])


# --- Orders and batches


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_batches_cover_epochs_and_repeat_no_record(one: int, other: int, seed: int) -> None:
    n, batch = max(one, other), min(one, other)
    steps = [batch_indices(n, batch, step, seed) for step in range(4 * n // batch + 3)]
    assert all(step.shape == (batch,) and step.dtype == np.int64 for step in steps)
    assert all(len(set(step.tolist())) == batch for step in steps)
    if n >= 2 * batch:
        stream = np.concatenate(steps)
        for start in range(0, len(stream) - n + 1, n):
            assert sorted(stream[start : start + n]) == list(range(n)), "an epoch shows every record once"
    last = len(steps) - 1
    assert np.array_equal(batch_indices(n, batch, last, seed), steps[last]), "a pure function of the step"


def test_batches_differ_by_seed_and_epoch_and_refuse_nonsense() -> None:
    assert not np.array_equal(batch_indices(100, 50, 0, 0), batch_indices(100, 50, 0, 1))
    assert not np.array_equal(batch_indices(100, 50, 0, 0), batch_indices(100, 50, 2, 0))
    for n, batch in ((10, 0), (10, 11)):
        with pytest.raises(ValueError, match=rf"batch={batch} must lie in \[1, n=10\]"):
            batch_indices(n, batch, 0, 0)


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_an_order_is_a_permutation_that_is_computed_in_any_pieces(n: int, seed: int, epoch: int) -> None:
    order = permuted(np.arange(n), n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    some = np.random.default_rng(0).permutation(n)[: n // 2]
    assert np.array_equal(permuted(some, n, seed, epoch), order[some])


@pytest.mark.parametrize("n", (3, 7, 16, 40))
def test_orders_are_as_random_as_shuffled_ones(n: int) -> None:
    """How often each thing lies at each place, and follows each other thing, against chance: each within 5 standard
    deviations of what chi-squared has."""
    epochs = 3000
    places, follows = np.zeros((n, n)), np.zeros((n, n))
    for epoch in range(epochs):
        order = permuted(np.arange(n), n, 5, epoch)
        places[np.arange(n), order] += 1
        np.add.at(follows, (order[:-1], order[1:]), 1)
    expected, others = epochs / n, ~np.eye(n, dtype=bool)
    for counts, freedom in ((places, (n - 1) ** 2), (follows[others], n * (n - 1) - 1)):
        chi = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


# --- Draws


def test_draws_follow_from_seed_and_step_and_are_all_there() -> None:
    one, again, other = (StepSampler([50], 8, seed) for seed in (3, 3, 4))
    for step in (5, 0, 11, 5):  # in any order
        for name in ("record", "caption", "seed"):
            values = getattr(one.draw(step), name)
            assert np.array_equal(values, getattr(again.draw(step), name)) and len(values) == 8
            assert not np.array_equal(values, getattr(other.draw(step), name))
            assert name == "record" or len(set(values)) == 8
    draws = one.draw(2)
    assert ((draws.caption >= 0) & (draws.caption < 1)).all() and (draws.seed >= 0).all()
    first = draws.at(0)
    assert (first.record, first.caption, first.seed) == (draws.record[0], draws.caption[0], draws.seed[0])


def test_captions_have_their_turn_alike() -> None:
    drawn = np.concatenate([StepSampler([64], 64, 0).draw(step).caption for step in range(50)])
    counts = np.bincount((drawn * 4).astype(int), minlength=4)
    assert (abs(counts - 800) < 5 * 800**0.5).all()


def test_a_batch_takes_each_label_once_and_reaches_every_record() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(40) * 5 - 7, 2))  # of any numbers
    sampler = StepSampler([30, 50], 40, 0, labels=labels)
    assert sampler.epoch_length == 40
    drawn: set[int] = set()
    for step in range(12):  # each of the two records of a label is missed with a chance of 2^-12
        batch = sampler.draw(step).record
        assert len(set(labels[batch])) == 40
        drawn.update(batch.tolist())
    assert len(drawn) > 0.95 * 80
    with pytest.raises(ConfigError, match=r"batch_size=41; allowed: at most 40, the number of labels"):
        StepSampler([30, 50], 41, 0, labels=labels)
    with pytest.raises(ConfigError, match=r"data.weights=\[1.0, 2.0\] with data.distinct='label'"):
        StepSampler([30, 50], 8, 0, labels=labels, weights=[1.0, 2.0])


@pytest.mark.parametrize(
    ("weights", "taken"),
    (
        ((1.0, 1.0), (30, 50)),
        ((0.5, 1.0), (15, 50)),  # a part of the first source in each epoch, all of it over two
        ((1.0, 0.1), (30, 5)),
        ((2.0, 1.0), (60, 50)),  # twice in an epoch, but never twice in a batch
        ((2.5, 0.3), (75, 15)),
    ),
)
def test_weights_give_each_source_its_share_of_every_epoch(weights: tuple[float, ...], taken: tuple[int, ...]) -> None:
    sampler = StepSampler([30, 50], 10, 1, weights=weights)
    assert abs(sampler.epoch_length - sum(taken)) <= 2 * np.ceil(max(weights))  # each part is rounded
    length, epochs = sampler.epoch_length, 20
    stream = images(sampler, length * epochs // 10)
    for epoch in range(epochs):
        first = (stream[epoch * length : (epoch + 1) * length] < 30).sum()
        assert abs(first - taken[0]) <= np.ceil(max(weights))
    counts = np.bincount(stream, minlength=80)
    for source in (counts[:30], counts[30:]):
        assert source.max() - source.min() <= 1, "every record has its turn as often as any other of its source"
    for step in range(len(stream) // 10):
        assert len(set(stream[step * 10 : (step + 1) * 10])) == 10


def test_a_batch_that_needs_more_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.batch_size=81; allowed: at most 80, the number of pairs"):
        StepSampler([30, 50], 81, 0)
    with pytest.raises(ConfigError, match=r"optimizer.batch_size=60; allowed: at most 55"):
        StepSampler([30, 50], 60, 0, weights=[1.0, 0.5])


def test_a_spare_is_of_a_later_batch_and_not_in_this_one() -> None:
    sampler = StepSampler([50], 20, 2)
    batch = set(sampler.draw(3).record.tolist())
    none = 0
    for position in range(20):
        for attempt in range(1, 6):
            spare, again = (s.spare(3, position, attempt) for s in (sampler, StepSampler([50], 20, 2)))
            assert spare == again
            expected = sampler.draw(3 + attempt).at(position)
            assert spare == (None if expected.record in batch else expected)
            none += spare is None
    assert 0 < none < 100


def test_a_spare_has_none_of_the_labels_of_the_batch() -> None:
    labels = np.arange(60) % 30
    sampler = StepSampler([60], 12, 0, labels=labels)
    batch = set(labels[sampler.draw(0).record])
    spares = [sampler.spare(0, position, attempt) for position in range(12) for attempt in range(1, 9)]
    found = [labels[spare.record] for spare in spares if spare is not None]
    assert found and not batch & set(found)


def test_ten_million_records_take_no_memory_and_no_time() -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    sampler = StepSampler([9_000_000, 1_000_000], 32_768, 0, weights=[1.0, 0.5])
    for step in (*range(20), 289, 290, 291, 10**6):  # an epoch ends with step 290
        assert len(set(sampler.draw(step).record.tolist())) == 32_768
    assert time.perf_counter() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
