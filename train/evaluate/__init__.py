"""Evaluation on held-out data: retrieval both ways, and zero-shot classification of the subject group.

    python -m train.evaluate runs/emoji

reloads the last whole checkpoint of the run (safetensors and JSON only) and writes evaluation.md and evaluation.json
there. Everything runs in fp32 on white backgrounds, without augmentation.

    embed      images and captions as unit rows
    retrieval  recall among all images of a split and the captions of all its concepts
    zero_shot  the nearest group by text alone
    report     the table, in words and as JSON
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from .. import checkpoint
from ..data import HeldOut, Pairs
from ..model import Clip
from .embed import embed_images
from .retrieval import Retrieval, retrieve
from .zero_shot import ZeroShot, classify, prototypes


@dataclass(frozen=True)
class SplitResult:
    """`captions`: the different canonical captions of the split, one for each concept."""

    images: int
    captions: int
    image_to_text: Retrieval
    text_to_image: Retrieval
    zero_shot: ZeroShot


def evaluate_checkpoint(
    folder: Path, held_out: HeldOut, before_each: Callable[[], None] = lambda: None
) -> dict[str, SplitResult]:
    """The results of one checkpoint folder by split. `before_each` is called before each split, and may raise to
    leave."""
    model, tokenizer = checkpoint.read_model(folder)
    centers = prototypes(model, tokenizer, held_out.groups)
    results = {}
    for split, pairs in held_out.splits.items():
        before_each()
        results[split] = evaluate_split(model, tokenizer, pairs, centers)
    return results


def evaluate_split(model: Clip, tokenizer: Tokenizer, pairs: Pairs, centers: Tensor) -> SplitResult:
    """`centers`: (groups, E), of each subject group; see zero_shot.prototypes."""
    x = embed_images(model, pairs.images)
    image_to_text, text_to_image = retrieve(model, tokenizer, pairs, x)
    captions = len(pairs.concepts.unique())
    return SplitResult(len(pairs), captions, image_to_text, text_to_image, classify(x, centers, pairs.groups))
