"""What a model is evaluated on: held-out pairs, checked before the first step, and the classes of zero-shot
classification."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data import BadRecordError, DataError, Source, count_bad, decode, open_source
from ..data.sources.drawn import drawn_classes, read_spec
from ..heartbeat import tick
from ..options import DataOptions
from ..world import World, on_each, on_first
from .shares import ALONE, in_shares

CHUNK = 256  # records that a rank reads at a time
DECODED = 10_000  # pictures of a set, at most, that are decoded before the first step
PROBE = "data.probe"


@dataclass(frozen=True)
class EvaluationSet:
    """n held-out records and their m different texts.

    source       where their pictures are
    records      (n,) int64, their numbers there
    texts        m captions: of each label one, the canonical caption of its first record. Where not every record has a
                 label, all captions of all records, each once
    shows        (p, 2) int64, the pairs of a record, 0 to n - 1, and a text, 0 to m - 1, that is right for it
    labels       (n,) int64; None where not every record has one
    class_names  n words; None where a record names no class
    left_out     bad records, counted by reason
    """

    source: Source
    records: np.ndarray
    texts: tuple[str, ...]
    shows: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str | None, ...]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.records)

    def with_class(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Of the records `kept`, (k,) int64, those that name a class: where they stand among these, the names, and
        their labels."""
        known = np.array([at for at, record in enumerate(kept) if self.class_names[record] is not None], dtype=np.int64)
        names = np.array([self.class_names[record] for record in kept[known]])
        return known, names, None if self.labels is None else self.labels[kept[known]]


@dataclass(frozen=True)
class Evaluation:
    """What a model is evaluated on.

    sets     by name
    classes  the texts of each class of zero-shot classification, by its name; empty where there is no such thing
    probe    what a linear probe is trained on, or None
    """

    sets: dict[str, EvaluationSet]
    classes: dict[str, list[str]]
    probe: EvaluationSet | None = None

    def fingerprints(self) -> dict[str, str]:
        """Of the data, by the name of the set."""
        probe = {} if self.probe is None else {PROBE: self.probe}
        return {name: pairs.source.fingerprint for name, pairs in (self.sets | probe).items()}


class _Described(NamedTuple):
    """A record without its picture; `number`: in the source."""

    number: int
    captions: tuple[str, ...]
    label: int | None
    class_name: str | None


def read_evaluation(options: DataOptions, world: World = ALONE) -> Evaluation:
    """All that an evaluation needs, on every rank, read in shares. Raises DataError where a source is missing, empty,
    or has too many bad records, ConfigError where a library is missing; the other ranks an ElsewhereError."""
    specs = {f"data.evaluate.{name}": spec for name, spec in options.evaluate.items()}
    if options.probe is not None:
        from .probe import require_scikit_learn

        on_each(world, require_scikit_learn)
        specs[PROBE] = options.probe
    classes = on_first(world, lambda: {} if options.classes is None else read_classes(options.classes, options.seed))
    sources = on_each(world, lambda: {option: open_source(spec, options) for option, spec in specs.items()})
    found = {option: read_set(option, source, options, world) for option, source in sources.items()}
    probe = found.pop(PROBE, None)
    if probe is not None:
        on_each(world, lambda: _check_probe(probe, options.seed))
    sets = {option.removeprefix("data.evaluate."): pairs for option, pairs in found.items()}
    return Evaluation(sets, classes or _classes_named(sets.values()), probe)


def _check_probe(pairs: EvaluationSet, seed: int) -> None:
    """Raises DataError where a probe cannot be fitted to them."""
    from .probe import split

    _, classes, groups = pairs.with_class(np.arange(len(pairs)))
    split(classes, groups, seed)


def _classes_named(sets: Iterable[EvaluationSet]) -> dict[str, list[str]]:
    """The classes that records name, each described by its name."""
    names = sorted({name for pairs in sets for name in pairs.class_names if name is not None})
    return {name: [name] for name in names} if len(names) > 1 else {}


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


def read_set(option: str, source: Source, options: DataOptions, world: World) -> EvaluationSet:
    """Read the texts of all records, and decode up to DECODED pictures, evenly spaced. Raises DataError where more than
    `options.max_bad_fraction` of the records are bad, or none is left; the message names `option`."""
    decoded = set(np.linspace(0, len(source) - 1, min(len(source), DECODED)).astype(int).tolist())

    def chunk(part: int) -> tuple[list[_Described], Counter[str]]:
        good, bad = [], Counter[str]()
        for number in range(CHUNK * part, min(CHUNK * (part + 1), len(source))):
            try:
                record = source.read(number)
                if number in decoded:
                    decode(record.image, options.max_pixels)
            except BadRecordError as error:
                bad[str(error.args[0])] += 1
                continue
            good.append(_Described(number, record.captions, record.label, record.class_name))
        tick()
        return good, bad

    chunks = in_shares(world, math.ceil(len(source) / CHUNK), chunk)
    bad = sum((some for _, some in chunks), Counter(source.left_out))
    records = [record for some, _ in chunks for record in some]
    on_each(world, lambda: _check(option, len(records), bad, options.max_bad_fraction))
    texts, shows = _texts(records)
    labels = [record.label for record in records]
    return EvaluationSet(
        source,
        np.array([record.number for record in records]),
        texts,
        shows,
        None if None in labels else np.array(labels),
        tuple(record.class_name for record in records),
        dict(bad),
    )


def _check(option: str, good: int, bad: Counter[str], allowed: float) -> None:
    if bad.total() > allowed * (good + bad.total()):
        raise DataError(
            f"{option}: of {good + bad.total()} records {count_bad(bad)} are bad, at most the fraction {allowed} may "
            "be; repair them or leave them out, or raise data.max_bad_fraction"
        )
    if not good:
        raise DataError(f"{option} holds no record; give a source that holds some")


def _texts(records: Sequence[_Described]) -> tuple[tuple[str, ...], np.ndarray]:
    """`texts` and `shows` of an EvaluationSet."""
    if any(record.label is None for record in records):
        captions = sorted({caption for record in records for caption in record.captions})
        place = {caption: index for index, caption in enumerate(captions)}
        shown = [(index, place[one]) for index, record in enumerate(records) for one in dict.fromkeys(record.captions)]
        return tuple(captions), np.array(shown)
    labels = np.array([record.label for record in records])
    _, first, text_of = np.unique(labels, return_index=True, return_inverse=True)
    texts = tuple(records[index].captions[0] for index in first)
    return texts, np.stack([np.arange(len(records)), text_of], 1)
