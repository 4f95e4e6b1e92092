"""Captions of keywords. Several things share a keyword, so that captions and pictures correspond many to many."""

from __future__ import annotations

import random
from collections.abc import Iterable

PAIRS = 4


def keyword_captions(name: str, keywords: Iterable[str], seed: int) -> list[str]:
    """The name with one keyword, and up to PAIRS of keywords without it, in an order that (seed, name) fixes; none
    where there are none."""
    words = list(keywords)
    # A str seed is hashed by random with SHA-512: the order is the same on every machine and Python.
    random.Random(f"{seed}:{name}").shuffle(words)
    pairs = [", ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
    return [f"{name}, {words[0]}", *pairs[:PAIRS]] if words else []
