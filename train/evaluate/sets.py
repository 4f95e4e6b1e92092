"""What a run is evaluated on: held-out pairs, checked before the first step, and the classes of zero-shot
classification."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data import BadRecordError, DataError, Source, count_bad, decode, open_source
from ..data.sources.drawn import drawn_classes, read_spec
from ..heartbeat import tick
from ..options import DataOptions

DECODED = 10_000  # pictures of a set, at most, that are decoded before the first step


@dataclass(frozen=True)
class EvaluationSet:
    """n held-out records, of which several may share a text.

    source    where their pictures are
    records   (n,) int64, their numbers there
    texts     m captions, one of each label; where records have no label, each different canonical caption once
    text_of   (n,) int64, the text of each record
    class_of  (n,) int64, the class of each record; None where a record names none, or one that is not known
    left_out  bad records, counted by reason
    """

    source: Source
    records: np.ndarray
    texts: tuple[str, ...]
    text_of: np.ndarray
    class_of: np.ndarray | None
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Evaluation:
    """`sets` by name; `classes`: the texts of each class of zero-shot classification, by its name."""

    sets: dict[str, EvaluationSet]
    classes: dict[str, list[str]]


def read_evaluation(options: DataOptions) -> Evaluation:
    """All that an evaluation needs. Raises DataError where a source is missing, empty, or has too many bad records."""
    classes = {} if options.classes is None else read_classes(options.classes, options.seed)
    sources = {name: open_source(spec, options) for name, spec in options.evaluate.items()}
    return Evaluation({name: read_set(name, sources[name], options, list(classes)) for name in sources}, classes)


def read_classes(spec: str, seed: int) -> dict[str, list[str]]:
    """The texts that describe each class, by its name; a class without texts is described by its name."""
    drawn = read_spec(spec)
    if drawn is not None:
        return drawn_classes(drawn, seed)
    try:
        classes = json.loads(Path(spec).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"data.classes={spec!r} cannot be read ({error}); give a JSON file of class names and lists of texts"
        ) from error
    texts = list(classes.values()) if isinstance(classes, dict) else [None]
    if len(texts) < 2 or not all(
        isinstance(some, list) and all(isinstance(text, str) for text in some) for some in texts
    ):
        raise DataError(
            f"data.classes={spec!r}; allowed: a JSON object of at least two class names, each with its texts"
        )
    return {name: some or [name] for name, some in classes.items()}


def read_set(name: str, source: Source, options: DataOptions, classes: Sequence[str]) -> EvaluationSet:
    """Read the texts of all records, and decode up to DECODED pictures, evenly spaced. Raises DataError where more than
    `options.max_bad_fraction` of the records are bad, or none is left."""
    bad = Counter(source.left_out)
    total = len(source) + bad.total()
    decoded = set(np.linspace(0, len(source) - 1, min(len(source), DECODED)).astype(int).tolist())
    kept, texts, labels, names = [], [], [], []
    for index in range(len(source)):
        if index % 256 == 0:
            tick()
        try:
            record = source.read(index)
            if index in decoded:
                decode(record.image, options.max_pixels)
        except BadRecordError as error:
            bad[str(error.args[0])] += 1
            continue
        kept.append(index)
        texts.append(record.captions[0])
        labels.append(record.label)
        names.append(record.class_name)
    if bad.total() > options.max_bad_fraction * total:
        raise DataError(
            f"data.evaluate.{name}: of {total} records {count_bad(bad)} are bad, at most the fraction "
            f"{options.max_bad_fraction} may be; repair them or leave them out, or raise data.max_bad_fraction"
        )
    if not kept:
        raise DataError(f"data.evaluate.{name} holds no record; give a source that holds some")
    keys = texts if None in labels else labels
    _, first, text_of = np.unique(np.array(keys), return_index=True, return_inverse=True)
    number = {one: index for index, one in enumerate(classes)}
    known = bool(classes) and all(one in number for one in names)
    return EvaluationSet(
        source,
        np.array(kept),
        tuple(texts[index] for index in first),
        text_of,
        np.array([number[str(one)] for one in names]) if known else None,
        dict(bad),
    )
