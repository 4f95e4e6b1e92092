"""Zero-shot classification: a picture goes to the class whose texts lie nearest, with no picture of any class having
been shown as such."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..towers import Bundle
from .embed import embed_texts


@dataclass(frozen=True)
class ZeroShot:
    """`accuracy`: share of pictures whose class is found. `chance`: that of a guess. `majority`: that of always naming
    the largest class."""

    accuracy: float
    chance: float
    majority: float


def prototypes(bundle: Bundle, classes: Iterable[Sequence[str]]) -> Tensor:
    """(classes, E): the unit mean embedding of each class's texts."""
    means = torch.stack([embed_texts(bundle, texts).mean(0) for texts in classes])
    return torch.nn.functional.normalize(means, dim=1)


def classify(x: Tensor, centers: Tensor, classes: Tensor) -> ZeroShot:
    """x (n, E) unit rows, centers (C, E) from `prototypes`, classes (n,) int64: the right ones."""
    predicted = (x @ centers.T).argmax(1)
    present = torch.bincount(classes, minlength=len(centers))
    return ZeroShot(
        accuracy=float((predicted == classes).double().mean()),
        chance=1 / len(centers),
        majority=float(present.max()) / len(classes),
    )
