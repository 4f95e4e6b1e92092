"""Evaluation on held-out data: retrieval both ways, zero-shot classification, and a linear probe.

    python -m train evaluate runs/emoji-1

reloads the last whole checkpoint of the run (safetensors and JSON only) and writes evaluation.md and evaluation.json
there. Everything runs in fp32, without augmentation, in shares over all ranks: the figures are the same for any number
of them.

    shares      what each rank does of it
    sets        what is evaluated on
    embed       pictures and captions as unit rows
    ranking     how often the right ones are among the nearest
    retrieval   recall among all images of a set and its different texts
    zero_shot   the nearest class by text alone
    probe       the class by logistic regression on embeddings
    report      the table, in words and as JSON
    records     what was found for each picture and text by itself
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checkpoint
from ..options import DataOptions
from ..towers import Bundle
from ..world import World, on_each, on_first
from .embed import embed_images, embed_texts
from .retrieval import Retrieval, retrieve
from .sets import Evaluation, EvaluationSet
from .zero_shot import Classifier, ZeroShot, build_classifier, classify


@dataclass(frozen=True)
class SetResult:
    """What a model does on a set.

    images, texts   how many of each, the texts being different ones
    zero_shot       None where the records name no classes
    probe           a probe.LinearProbe; None where data.probe is not set or the records name no classes
    image_labels    (images,) int64, what each picture shows; a number of its own where not every record has a label
    text_labels     (q,) int64, likewise of the first picture of each text that is asked for
    """

    images: int
    texts: int
    image_to_text: Retrieval
    text_to_image: Retrieval
    zero_shot: ZeroShot | None
    probe: Any
    image_labels: np.ndarray = field(repr=False, compare=False)
    text_labels: np.ndarray = field(repr=False, compare=False)


def evaluate_checkpoint(
    folder: Path,
    evaluation: Evaluation,
    options: DataOptions,
    world: World,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, SetResult]:
    """Those of the model in a checkpoint's folder; see evaluate_towers."""
    bundle = on_each(world, lambda: checkpoint.read_bundle(folder))
    bundle.module.to(world.device)
    return evaluate_towers(bundle, evaluation, options, world, before_each)


def evaluate_towers(
    bundle: Bundle,
    evaluation: Evaluation,
    options: DataOptions,
    world: World,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, SetResult]:
    """The results by set, on every rank; `bundle` is in evaluation mode, on the device. All ranks call it.
    `before_each` is called before each set, and may raise to leave."""
    classifier = None
    if evaluation.classes:
        classifier = build_classifier(bundle, evaluation.classes, options.templates, world)
    probe = None if evaluation.probe is None else _fit_probe(bundle, evaluation.probe, options, world)
    results = {}
    for name, pairs in evaluation.sets.items():
        before_each()
        results[name] = evaluate_set(bundle, pairs, options, world, classifier, probe)
    return results


def evaluate_set(
    bundle: Bundle,
    pairs: EvaluationSet,
    options: DataOptions,
    world: World,
    classifier: Classifier | None = None,
    probe: Any = None,
) -> SetResult:
    """Retrieval; zero-shot classification where there is a `classifier`, and a linear probe where there is a `probe`
    (probe.Probe), if records name classes."""
    x, kept = embed_images(bundle, pairs, options, world)
    y = embed_texts(bundle, pairs.texts, world)
    shows = _of_kept(pairs.shows, kept)
    image_to_text, text_to_image = retrieve(x, y, torch.from_numpy(shows), world)
    labels = (np.arange(len(pairs)) if pairs.labels is None else pairs.labels)[kept]
    _, first = np.unique(shows[:, 1], return_index=True)
    zero_shot = probed = None
    if classifier is not None:
        zero_shot = classify(x, [pairs.class_names[record] for record in kept], classifier, world)
    known, classes, _ = pairs.with_class(kept)
    if probe is not None and len(known):
        probed = on_first(world, lambda: probe.score(x[known], classes))
    return SetResult(len(x), len(y), image_to_text, text_to_image, zero_shot, probed, labels, labels[shows[first, 0]])


def _of_kept(shows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The pairs of those records that were kept, by their new numbers."""
    place = np.full(int(shows[:, 0].max()) + 1, -1)
    place[kept] = np.arange(len(kept))
    renumbered = np.stack([place[shows[:, 0]], shows[:, 1]], 1)
    return renumbered[renumbered[:, 0] >= 0]


def _fit_probe(bundle: Bundle, pairs: EvaluationSet, options: DataOptions, world: World) -> Any:
    """By rank 0, which gives it to all."""
    from . import probe

    rows, kept = embed_images(bundle, pairs, options, world)
    known, classes, groups = pairs.with_class(kept)
    return on_first(world, lambda: probe.fit(rows[known], classes, options.seed, groups))
