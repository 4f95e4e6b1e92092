"""Captions exchanged between records on purpose, for studies of noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .record import DataError

DERANGEMENT_ROUNDS = 1000


def corruption_sources(labels: Sequence[int] | np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n,) int64: whose captions each record gets, itself where it is left alone.

    labels  (n,) int64, what each record shows; where nobody says, a number of its own for each

    `round(share * n)` records exchange captions among themselves, each with one of another label (another picture of
    the same thing carries the same captions, so that a plain derangement could change nothing). Raises DataError where
    no such exchange was found, because one label holds too many of the chosen records.
    """
    ids = np.asarray(labels, dtype=np.int64)
    source = np.arange(len(ids))
    rng = np.random.default_rng([seed, 0xC0])
    chosen = rng.permutation(len(ids))[: round(share * len(ids))]
    if not len(chosen):
        return source
    drawn = rng.permutation(chosen)
    for _ in range(DERANGEMENT_ROUNDS):
        clashes = np.flatnonzero(ids[drawn] == ids[chosen])
        if not len(clashes):
            source[chosen] = drawn
            return source
        for clash, other in zip(clashes, rng.integers(len(chosen), size=len(clashes)), strict=True):
            drawn[clash], drawn[other] = drawn[other], drawn[clash]
    raise DataError(
        f"data.noise.swap={share} chooses {len(chosen)} of {len(ids)} records, and their captions cannot be exchanged "
        "between different labels; choose a larger share, or 0"
    )
