"""How sure a difference is: against scipy, hand calculations, and the bootstrap's exact distribution where it is small
enough to be listed."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from train.study import intervals
from train.study.intervals import DRAWS, Interval, draw_means, holm, percentile_interval, t_interval, widest

DIFFERENCES = [0.031, 0.012, 0.044, -0.003, 0.020]


def test_the_t_interval_and_its_p_value_are_those_of_scipy() -> None:
    expected = stats.ttest_1samp(DIFFERENCES, 0.0)
    found = t_interval(DIFFERENCES)
    assert found is not None and found.method == intervals.OVER_SEEDS
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)


def test_the_t_interval_of_three_seeds_by_hand() -> None:
    """Mean 2, standard deviation 1, and 4.302653 standard errors each way."""
    found = t_interval([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-6)  # t is the root of 12, with two degrees


def test_one_seed_has_no_interval_and_equal_differences_no_doubt() -> None:
    assert t_interval([0.1]) is None and t_interval([]) is None
    assert t_interval([0.5, 0.5]) == Interval(0.5, 0.5, intervals.OVER_SEEDS, 0.0)
    assert t_interval([0.0, 0.0]) == Interval(0.0, 0.0, intervals.OVER_SEEDS, 1.0)


def test_holm_by_hand() -> None:
    """The smallest of four times 4, the next times 3, ..., none below one before it, none above 1."""
    assert holm([0.03, 0.01, 0.04, 0.6]) == pytest.approx([0.09, 0.04, 0.09, 0.6])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_the_bootstrap_has_the_distribution_that_can_be_listed() -> None:
    """Two seeds and two concepts of different sizes: 4 draws of seeds times 4 of concepts, all equally likely."""
    sums, counts = np.array([[[1.0, 6.0], [3.0, 2.0]]]), np.array([[[2, 8], [4, 4]]])
    expected = Counter[float]()
    for seeds, concepts in itertools.product(itertools.product((0, 1), repeat=2), repeat=2):
        picked = [(sums[0, seed, list(concepts)].sum(), counts[0, seed, list(concepts)].sum()) for seed in seeds]
        expected[round(sum(hits / queries for hits, queries in picked) / 2, 9)] += 1 / 16
    found = Counter(np.round(draw_means(sums, counts)[:, 0], 9).tolist())
    assert found.keys() == expected.keys() and found.total() == DRAWS
    for value, share in expected.items():  # of 10,000 draws: six standard errors
        assert abs(found[value] / DRAWS - share) < 6 * math.sqrt(share * (1 - share) / DRAWS), value


def test_the_bootstrap_draws_concepts_alike_for_all_figures_and_seeds() -> None:
    """What two methods share cancels in their difference; and queries of one concept come together."""
    generator = np.random.default_rng(0)
    sums = generator.random((1, 3, 30))
    counts = np.ones_like(sums)
    twice = draw_means(np.concatenate([sums, sums + 0.25]), np.concatenate([counts, counts]))
    assert np.allclose(twice[:, 1] - twice[:, 0], 0.25)
    assert np.allclose(draw_means(7 * sums, 7 * counts), draw_means(sums, counts))
    alike = np.repeat(sums[:, :1], 3, axis=1)  # seeds that agree: all that varies is the concepts, once for all seeds
    assert np.std(draw_means(alike, counts)) == pytest.approx(np.std(sums[0, 0]) / math.sqrt(30), rel=0.03)


def test_the_bootstrap_in_blocks_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.random.default_rng(0).random((2, 3, 30))
    whole = draw_means(sums, np.ones_like(sums))
    monkeypatch.setattr(intervals, "BLOCK", 30 * 999)
    parts = draw_means(sums, np.ones_like(sums))
    assert parts.shape == whole.shape == (DRAWS, 2)
    assert np.std(parts, axis=0) == pytest.approx(np.std(whole, axis=0), rel=0.04)


def test_a_draw_without_queries_does_not_count() -> None:
    """Of a set that holds one of two concepts: a quarter of the draws has none of it."""
    draws = draw_means(np.array([[[1.0, 0.0]]]), np.array([[[2, 0]]]))[:, 0]
    assert np.isnan(draws).mean() == pytest.approx(0.25, abs=0.03)
    found = percentile_interval(draws)
    assert found is not None and (found.low, found.high, found.method) == (0.5, 0.5, intervals.OVER_BOTH)
    assert percentile_interval(np.array([math.nan])) is None


def test_the_interval_of_draws_by_hand() -> None:
    """Of 0, 1, ..., 199 less 3: 5 of 200 lie in each tail, and 4 are not above 0."""
    found = percentile_interval(np.arange(200.0) - 3)
    assert found is not None and (found.low, found.high) == pytest.approx((199 * 0.025 - 3, 199 * 0.975 - 3))
    assert found.p == pytest.approx(2 * (4 + 1) / 201) and not found.holds_zero
    around = percentile_interval(np.array([-1.0, 1.0]))
    assert around is not None and around.p == 1.0 and around.holds_zero


def test_the_interval_that_claims_least_is_kept() -> None:
    narrow, wide = Interval(0.1, 0.2, "narrow", 0.04), Interval(-0.1, 0.2, "wide", 0.03)
    assert widest([narrow, wide]) == widest([wide, narrow]) == Interval(-0.1, 0.2, "wide", 0.04)
    assert widest([narrow]) == narrow and widest([]) is None
    assert wide.holds_zero and not narrow.holds_zero and not Interval(-0.2, -0.1, "", 0.0).holds_zero
