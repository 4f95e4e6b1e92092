"""Retrieval within a set: image → text and text → image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..world import World
from .ranking import expected_hits, hits

DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """`recall`: R@k by k, of DEPTHS. `chance`: that of a guess. `hits`: (n, len(DEPTHS)) float64, what each query adds
    to the mean that a recall is."""

    recall: dict[int, float]
    chance: dict[int, float]
    hits: Tensor = field(repr=False, compare=False)


def retrieve(x: Tensor, y: Tensor, shows: Tensor, world: World) -> tuple[Retrieval, Retrieval]:
    """Image → text and text → image, between the images x (n, E) and the different texts y (m, E) of a set.

    shows  (p, 2) int64, pairs of an image and a text that is right for it. Every image has one or more, any of which
           counts; a text has any number, and is asked for where it has one, in the order of texts
    """
    asked, query = shows[:, 1].unique(return_inverse=True)
    from_text = torch.stack([query, shows[:, 0]], 1)
    return _retrieve(x, y, shows, world), _retrieve(y[asked], x, from_text, world)


def _retrieve(queries: Tensor, items: Tensor, right: Tensor, world: World) -> Retrieval:
    right = right.unique(dim=0)  # in the order of queries
    found = hits(queries, items, right, DEPTHS, world)
    counts = torch.bincount(right[:, 0], minlength=len(queries))
    guessed = expected_hits(torch.zeros_like(counts), len(items) - counts, counts, DEPTHS)
    return Retrieval(_means(found), _means(guessed), found)


def _means(hits: Tensor) -> dict[int, float]:
    return dict(zip(DEPTHS, hits.mean(0).tolist(), strict=True))
