"""Retrieval within a set: image → text and text → image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEPTHS = (1, 5, 10)
BLOCK = 1024  # queries at a time: the matrix of all similarities is never there


@dataclass(frozen=True)
class Retrieval:
    """`recall`: R@k by k, of DEPTHS. `chance`: R@1 of a guess."""

    recall: dict[int, float]
    chance: float


def retrieve(x: Tensor, y: Tensor, text_of: Tensor) -> tuple[Retrieval, Retrieval]:
    """Image → text and text → image, between the images x (n, E) and the different texts y (m, E) of a set; text_of
    (n,) int64.

    Several images may share one text: an image has one right text, a text one or more right images, any of which
    counts.
    """
    own = torch.arange(len(y))
    present = torch.isin(own, text_of)  # a text whose every picture is bad is asked for by nobody
    return _recalls(x, text_of, y, own), _recalls(y[present], own[present], x, text_of)


def _recalls(queries: Tensor, wanted: Tensor, items: Tensor, held: Tensor) -> Retrieval:
    """Query i wants the items that hold wanted[i]; the best of them counts. A tie with another item is a miss."""
    better, chance = [], 0.0
    for rows, ids in zip(queries.split(BLOCK), wanted.split(BLOCK), strict=True):
        similarity, right = rows @ items.T, ids[:, None] == held
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        better.append(((similarity >= best) & ~right).sum(1))
        chance += float(right.double().mean(1).sum())
    counts = torch.cat(better)
    return Retrieval({depth: float((counts < depth).double().mean()) for depth in DEPTHS}, chance / len(queries))
