"""The four splits, fixed by a seed, and the rules that keep the held-out ones free of leakage.

- `train`: drawings of seen concepts by the four training vendors.
- `heldout`: other drawings of seen concepts; each concept keeps a drawing by another vendor in `train`.
- `concepts`: the training vendors' drawings of unseen concepts. Unseen means whole families (see `family_of`): a
  woman cook is not held out while a man cook is trained on. No vendor's drawing of an unseen concept is in `train`.
- `vendor`: the unseen vendor's drawings of seen concepts; its drawings of unseen concepts are in no split.

Last, a held-out picture whose pixels equal a training picture's is dropped, and so is one equal to a picture of another
concept in its own split, where a 1-of-N retrieval target would be ambiguous.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from .concepts import Concept
from .drawings import UNSEEN_VENDOR, Rendered

SPLITS = ("train", "heldout", "concepts", "vendor")
UNSEEN_CONCEPT_SHARE = 0.0865
HELDOUT_SHARE = 0.096


@dataclass(frozen=True)
class Split:
    """Pictures by split name, and how many pictures were dropped for each reason."""

    pictures: dict[str, list[Rendered]]
    dropped: dict[str, int]


def unseen_concepts(concepts: list[Concept], seed: int, share: float) -> set[int]:
    """Indices of about `share` of the concepts, in whole families."""
    families: dict[str, list[int]] = {}
    for concept in concepts:
        families.setdefault(concept.family, []).append(concept.index)
    order = sorted(families)
    random.Random(f"concepts:{seed}").shuffle(order)
    wanted = round(share * len(concepts))
    unseen: set[int] = set()
    for family in order:
        if len(unseen) + len(families[family]) <= wanted:
            unseen.update(families[family])
    return unseen


def _held_out_keys(seen: list[Rendered], seed: int, share: float) -> set[str]:
    """Keys of about `share` of the drawings, never the last drawing left of a concept."""
    left = Counter(picture.drawing.concept.index for picture in seen)
    order = sorted(seen, key=lambda picture: picture.drawing.key)
    random.Random(f"heldout:{seed}").shuffle(order)
    wanted = round(share * len(seen))
    held: set[str] = set()
    for picture in order:
        concept = picture.drawing.concept.index
        if len(held) < wanted and left[concept] > 1:
            left[concept] -= 1
            held.add(picture.drawing.key)
    return held


def split_pictures(
    pictures: list[Rendered],
    concepts: list[Concept],
    seed: int,
    unseen_share: float = UNSEEN_CONCEPT_SHARE,
    heldout_share: float = HELDOUT_SHARE,
) -> Split:
    """Assign each picture to a split or drop it; the same pictures and seed give the same splits in the same order."""
    unseen = unseen_concepts(concepts, seed, unseen_share)
    seen = [p for p in pictures if p.drawing.vendor != UNSEEN_VENDOR and p.drawing.concept.index not in unseen]
    held = _held_out_keys(seen, seed, heldout_share)
    chosen: dict[str, list[Rendered]] = {
        "train": [p for p in seen if p.drawing.key not in held],
        "heldout": [p for p in seen if p.drawing.key in held],
        "concepts": [p for p in pictures if p.drawing.vendor != UNSEEN_VENDOR and p.drawing.concept.index in unseen],
        "vendor": [p for p in pictures if p.drawing.vendor == UNSEEN_VENDOR and p.drawing.concept.index not in unseen],
    }
    trained_pixels = {p.pixels for p in chosen["train"]}
    # Dropping a held-out picture cannot unseat its concept: at least one drawing of it was kept in train above.
    dropped: Counter[str] = Counter()
    for name in SPLITS:
        if name != "train":
            kept: dict[str, Rendered] = {}
            for picture in chosen[name]:
                if picture.pixels in trained_pixels:
                    dropped[f"{name}: same pixels as a training picture"] += 1
                elif picture.pixels in kept:
                    dropped[f"{name}: same pixels as another of the split"] += 1
                else:
                    kept[picture.pixels] = picture
            chosen[name] = list(kept.values())
        # Shuffled so that a reader that streams the shards in order sees no order of concepts or vendors.
        random.Random(f"order:{name}:{seed}").shuffle(chosen[name])
    both_unseen = sum(p.drawing.vendor == UNSEEN_VENDOR and p.drawing.concept.index in unseen for p in pictures)
    dropped["unseen concept by the unseen vendor"] = both_unseen
    return Split(chosen, dict(dropped))
