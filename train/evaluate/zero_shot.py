"""Zero-shot classification: a picture goes to the subject group whose texts lie nearest, with no picture of any group
having been shown as such."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..model import Clip
from .embed import embed_captions


@dataclass(frozen=True)
class ZeroShot:
    """`accuracy`: share of pictures whose group is found. `chance`: that of a guess. `majority`: that of always naming
    the largest group."""

    accuracy: float
    chance: float
    majority: float


def prototypes(model: Clip, tokenizer: Tokenizer, groups: list[list[str]]) -> Tensor:
    """(groups, E): the unit mean embedding of each group's texts (see data.run_data.describe_groups)."""
    means = torch.stack([embed_captions(model, tokenizer, texts).mean(0) for texts in groups])
    return torch.nn.functional.normalize(means, dim=1)


def classify(x: Tensor, centers: Tensor, groups: Tensor) -> ZeroShot:
    """x (n, E) unit rows, centers (groups, E) from `prototypes`, groups (n,) int64: the right ones."""
    predicted = (x @ centers.T).argmax(1)
    present = torch.bincount(groups, minlength=len(centers))
    return ZeroShot(
        accuracy=float((predicted == groups).double().mean()),
        chance=1 / len(centers),
        majority=float(present.max()) / len(groups),
    )
