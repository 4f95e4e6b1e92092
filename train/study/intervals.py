"""How sure a difference is that was seen at some seeds: t intervals, a two-level bootstrap, and Holm's correction.

Two things are left to chance: the seed of a run, and which concepts a test set happens to hold. The t interval over
seeds knows the first, and the second as far as seeds change the test set; the bootstrap draws both anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

LEVEL = 0.95
DRAWS = 10_000
BLOCK = 2**22  # numbers in a block of drawn concepts
OVER_SEEDS, OVER_BOTH = "t, seeds", "bootstrap, seeds and concepts"


@dataclass(frozen=True)
class Interval:
    """Of LEVEL, by `method`, OVER_SEEDS or OVER_BOTH; `p`: the two-sided p value of 0 by the same."""

    low: float
    high: float
    method: str
    p: float

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def t_interval(differences: Sequence[float]) -> Interval | None:
    """Of the mean of differences at as many seeds, and Student's p value; None for fewer than two."""
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return None
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / math.sqrt(count)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * error
    if error == 0.0:
        return Interval(mean, mean, OVER_SEEDS, p=float(mean == 0.0))
    p = 2 * float(t.sf(abs(mean) / error, count - 1))
    return Interval(mean - half, mean + half, OVER_SEEDS, p)


def holm(values: Sequence[float]) -> list[float]:
    """p values of one family, corrected by Holm's step-down method."""
    corrected, least = [0.0] * len(values), 0.0
    for rank, index in enumerate(np.argsort(values, kind="stable").tolist()):
        least = max(least, min((len(values) - rank) * values[index], 1.0))
        corrected[index] = least
    return corrected


def draw_means(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """The two-level bootstrap of K figures: (DRAWS, K) means over seeds, of which each draw takes S with replacement,
    and over test concepts, of which it takes C, the same for all figures and seeds.

    sums    (K, S, C): of figure k at seed s, what the queries of concept c found, summed
    counts  (K, S, C): how many queries these are

    A draw that takes no concept that a figure has queries of is NaN there.
    """
    figures, seeds, concepts = sums.shape
    generator = np.random.default_rng(seed)
    columns = [array.reshape(-1, concepts).T.astype(np.float64) for array in (sums, counts)]
    parts = []
    for begin in range(0, DRAWS, block := max(BLOCK // concepts, 1)):
        rows = min(block, DRAWS - begin)
        drawn = generator.integers(0, concepts, (rows, concepts)) + concepts * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * concepts).reshape(rows, concepts).astype(np.float64)
        chosen = generator.integers(0, seeds, (rows, 1, seeds))
        with np.errstate(invalid="ignore"):
            means = ((weights @ columns[0]) / (weights @ columns[1])).reshape(rows, figures, seeds)
        parts.append(np.take_along_axis(means, np.broadcast_to(chosen, means.shape), 2).mean(2))
    return np.concatenate(parts)


def percentile_interval(draws: np.ndarray) -> Interval | None:
    """Of a bootstrap's (DRAWS,) draws; None where none is a number."""
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return None
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return Interval(low, high, OVER_BOTH, min(2 * (beyond + 1) / (len(draws) + 1), 1.0))


def widest(intervals: Sequence[Interval]) -> Interval | None:
    """The one of several that claims least, with the largest of their p values; None of none."""
    if not intervals:
        return None
    return replace(max(intervals, key=lambda one: one.high - one.low), p=max(one.p for one in intervals))
