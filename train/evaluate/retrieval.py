"""Retrieval within a split: image → text and text → image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..data import Pairs
from ..model import Clip
from .embed import embed_captions

DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """`recall`: R@k by k, of DEPTHS. `chance`: R@1 of a guess."""

    recall: dict[int, float]
    chance: float


def retrieve(model: Clip, tokenizer: Tokenizer, pairs: Pairs, x: Tensor) -> tuple[Retrieval, Retrieval]:
    """Image → text and text → image, between all images of a split, x (n, E), and the canonical captions of all its
    concepts.

    Several drawings of one concept share its caption: an image has one right caption, a caption one or more right
    images, any of which counts.
    """
    concepts, concept_of = torch.unique(pairs.concepts, return_inverse=True)
    first = {int(concept): index for index, concept in reversed(list(enumerate(concept_of.tolist())))}
    captions = [pairs.captions[first[index]][0] for index in range(len(concepts))]
    similarity = x @ embed_captions(model, tokenizer, captions).T  # (images, captions); a few million entries at most
    positive = torch.nn.functional.one_hot(concept_of, len(concepts)).bool()
    return _recalls(similarity, positive), _recalls(similarity.T, positive.T)


def _recalls(similarity: Tensor, positive: Tensor) -> Retrieval:
    """Rows query columns; the best right column counts. A tie with a wrong column counts as a miss."""
    best = similarity.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    better = ((similarity >= best) & ~positive).sum(1)
    chance = float(positive.double().mean(1).mean())
    return Retrieval({depth: float((better < depth).double().mean()) for depth in DEPTHS}, chance)
