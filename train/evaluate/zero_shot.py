"""Zero-shot classification: a picture goes to the class whose texts lie nearest, with no picture of any class having
been shown as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..towers import Bundle
from ..world import World
from .embed import embed_texts
from .ranking import hits

DEPTHS = (1, 5)


@dataclass(frozen=True)
class Classifier:
    """`names`: of C classes. `centers`: (C, E), the unit mean embedding of each one's texts."""

    names: tuple[str, ...]
    centers: Tensor


@dataclass(frozen=True)
class ZeroShot:
    """What is found among pictures whose class is known, as shares of 1.

    classes                how many classes there are to choose from
    acc1, acc5             pictures whose class is the nearest one, or one of the five nearest; acc5 is None where there
                           are fewer
    mean_per_class_recall  acc1 within each class that has pictures, averaged over these
    majority               acc1 of always naming the largest class; that of a guess is 1 / classes
    images                 which pictures of the set these are, (k,) int64
    hits                   (k, len(DEPTHS)) float64, what each adds to acc1 and acc5
    """

    classes: int
    acc1: float
    acc5: float | None
    mean_per_class_recall: float
    majority: float
    images: Tensor = field(repr=False, compare=False)
    hits: Tensor = field(repr=False, compare=False)


def build_classifier(
    bundle: Bundle, classes: Mapping[str, Sequence[str]], templates: Sequence[str], world: World
) -> Classifier:
    """`classes`: the texts of each class, by its name. Each text is put into each template; with none it is embedded as
    it is."""
    texts = [[one.replace("{}", text) for text in some for one in templates or ("{}",)] for some in classes.values()]
    rows = embed_texts(bundle, [text for some in texts for text in some], world)
    means = torch.stack([part.mean(0) for part in rows.split([len(some) for some in texts])])
    return Classifier(tuple(classes), torch.nn.functional.normalize(means, dim=1))


def classify(x: Tensor, named: Sequence[str | None], classifier: Classifier, world: World) -> ZeroShot | None:
    """x (n, E) unit rows of pictures, and the class that each one's record names: those that name none that the
    classifier knows are left out. None where all are."""
    number = {name: index for index, name in enumerate(classifier.names)}
    known = torch.tensor([index for index, name in enumerate(named) if name in number])
    if not len(known):
        return None
    classes = torch.tensor([number[name] for name in named if name in number])
    right = torch.stack([torch.arange(len(known)), classes], 1)
    found = hits(x[known], classifier.centers, right, DEPTHS, world)
    sizes = torch.bincount(classes, minlength=len(number))
    recalls = torch.bincount(classes, found[:, 0], minlength=len(number))[sizes > 0] / sizes[sizes > 0]
    return ZeroShot(
        classes=len(number),
        acc1=float(found[:, 0].mean()),
        acc5=float(found[:, 1].mean()) if len(number) >= DEPTHS[1] else None,
        mean_per_class_recall=float(recalls.mean()),
        majority=float(sizes.max()) / len(known),
        images=known,
        hits=found,
    )
