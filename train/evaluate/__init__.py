"""Evaluation on held-out data: retrieval both ways, and zero-shot classification.

    python -m train evaluate runs/emoji-1

reloads the last whole checkpoint of the run (safetensors and JSON only) and writes evaluation.md and evaluation.json
there. Everything runs in fp32, without augmentation.

    sets       what is evaluated on
    embed      pictures and captions as unit rows
    retrieval  recall among all images of a set and its different texts
    zero_shot  the nearest class by text alone
    report     the table, in words and as JSON
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..options import DataOptions
from ..towers import Bundle
from .embed import embed_images, embed_texts
from .retrieval import Retrieval, retrieve
from .sets import Evaluation, EvaluationSet
from .zero_shot import ZeroShot, classify, prototypes


@dataclass(frozen=True)
class SetResult:
    """`captions`: the different texts of the set. `zero_shot`: None where its records name no classes."""

    images: int
    captions: int
    image_to_text: Retrieval
    text_to_image: Retrieval
    zero_shot: ZeroShot | None


def evaluate_checkpoint(
    folder: Path,
    evaluation: Evaluation,
    options: DataOptions,
    device: torch.device,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, SetResult]:
    """The results of one checkpoint folder by set. `before_each` is called before each set, and may raise to leave."""
    bundle = checkpoint.read_bundle(folder)
    bundle.module.to(device)
    centers = prototypes(bundle, evaluation.classes.values()) if evaluation.classes else None
    results = {}
    for name, pairs in evaluation.sets.items():
        before_each()
        results[name] = evaluate_set(bundle, pairs, options, centers)
    return results


def evaluate_set(bundle: Bundle, pairs: EvaluationSet, options: DataOptions, centers: Tensor | None) -> SetResult:
    """`centers`: (C, E), of each class; see zero_shot.prototypes."""
    x, kept = embed_images(bundle, pairs, options)
    y = embed_texts(bundle, pairs.texts)
    text_of = torch.from_numpy(pairs.text_of[kept])
    image_to_text, text_to_image = retrieve(x, y, text_of)
    zero_shot = None
    if centers is not None and pairs.class_of is not None:
        zero_shot = classify(x, centers, torch.from_numpy(pairs.class_of[kept]))
    return SetResult(len(x), len(y), image_to_text, text_to_image, zero_shot)
