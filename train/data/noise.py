"""Captions made wrong on purpose, for studies of noise, in the ways of options.NOISE:

swap        records exchange their captions, each with one of another label
near_swap   likewise, two and two, within a class
partial     one word is left of all captions, a keyword (_keywords)
wrong_word  a keyword of a record of another label is put among the words of each caption, or in the place of one
junk        a caption that says nothing of any picture

Which records, how, and the words are functions of (data.seed, record) alone: every epoch, rank and resumed run reads
the same wrong captions.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..files import write_atomically
from ..options import NOISE, ConfigError
from .record import BadRecordError, DataError, Record, Source
from .sources.reading import Progress

JUNK = ("icon {0}px", "image {0:04}", "img_{0:04}.png", "untitled {0}", "photo {0}", "click to enlarge")
ACCOUNT = "noise.csv.gz"
ROUNDS = 1000  # of exchanges, until no record has a caption of its own label


class Noisy:
    """A source, of whose records round(share * n) have captions made wrong in each of the ways `shares`; near_swap
    takes an even number.

    kinds   (n,) uint8: Record.noise of every record
    others  (n,) int32, or int64 where it must be: whose captions, or word, each record gets; its own number for none

    Raises ConfigError where near_swap is asked for and not every record names a class, DataError where the captions of
    so many records cannot be exchanged.
    """

    def __init__(self, source: Source, shares: Mapping[str, float], seed: int) -> None:
        labels = source.labels()
        classes = source.classes() if shares.get("near_swap") else None
        if shares.get("near_swap") and classes is None:
            raise ConfigError(
                f"data.noise.near_swap={shares['near_swap']}, but not every record of data.source names a class; "
                "allowed: 0, or records with a class"
            )
        self._source, self._seed = source, seed
        self.fingerprint, self.left_out = source.fingerprint, source.left_out
        self.labels, self.classes = source.labels, source.classes
        self.kinds, self.others = draw_noise(
            np.arange(len(source)) if labels is None else labels, shares, seed, classes
        )

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Record:
        record = self._source.read(index)
        kind = int(self.kinds[index])
        if not kind:
            return record
        other = int(self.others[index])
        captions = record.captions if other == index else self._source.read(other).captions
        rng = np.random.default_rng([self._seed, 0xC1, index])
        match NOISE[kind - 1]:
            case "partial":
                captions = (_word(_keywords(record.captions), rng),)
            case "wrong_word":
                captions = _with_a_word(record.captions, captions, rng)
            case "junk":
                captions = (JUNK[rng.integers(len(JUNK))].format(rng.integers(10_000)),)
        return replace(record, captions=captions, noise=kind)

    def describe(self) -> str:
        counts = np.bincount(self.kinds, minlength=len(NOISE) + 1).tolist()[1:]
        return ", ".join(f"{kind} {count}" for kind, count in zip(NOISE, counts, strict=True) if count) or "none"

    def write_account(self, folder: Path) -> None:
        """ACCOUNT: a row for each record with a wrong caption, but for those that cannot be read. `from`: the record
        whose captions, or word, it has; `caption`: the first that it has now."""
        wrong = np.flatnonzero(self.kinds)
        progress = Progress("records with wrong captions are listed", len(wrong))
        packed = io.BytesIO()
        with io.TextIOWrapper(gzip.GzipFile(fileobj=packed, mode="wb", mtime=0), "utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("key", "kind", "from", "caption"))
            for done, index in enumerate(wrong.tolist()):
                progress.at(done)
                other = int(self.others[index])
                try:
                    record = self.read(index)
                    source = self._source.read(other).key if other != index else ""
                except BadRecordError:
                    continue  # it is counted when its batch is read
                rows.writerow((record.key, NOISE[record.noise - 1], source, record.captions[0]))
        write_atomically(folder / ACCOUNT, packed.getvalue())


def draw_noise(
    labels: np.ndarray, shares: Mapping[str, float], seed: int, classes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`kinds` and `others` of Noisy. Of one kind, the records of a small share are among those of a larger one, but for
    near_swap's.

    labels   (n,) int64, what each record shows; where nobody says, a number of its own for each
    classes  (n,) int64, which near_swap needs: Source.classes
    """
    n = len(labels)
    rng = np.random.default_rng([seed, 0xC0])
    kinds, others = np.zeros(n, np.uint8), np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
    free = rng.permutation(n)
    for number, kind in enumerate(NOISE, 1):
        share = shares.get(kind, 0.0)
        chosen = free[: round(share * n)]
        if not len(chosen):
            continue
        if kind == "swap":
            others[chosen] = _exchanged(labels, chosen, share, rng)
        elif kind == "near_swap":
            assert classes is not None
            pairs = _pairs(labels, classes, free, rng)[: len(chosen) // 2]
            if len(pairs) < len(chosen) // 2:
                raise DataError(
                    f"data.noise.near_swap={share} chooses {len(chosen)} of {n} records, and only {2 * len(pairs)} "
                    "can exchange their captions with one of their class and another label; choose a smaller share"
                )
            chosen = pairs.ravel()
            others[chosen] = pairs[:, ::-1].ravel()
        elif kind == "wrong_word":
            others[chosen] = _strangers(labels, chosen, share, rng)
        kinds[chosen] = number
        free = free[kinds[free] == 0]
    return kinds, others


def _exchanged(labels: np.ndarray, chosen: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The chosen records in an order in which each stands for one of another label: another picture of the same thing
    carries the same captions, so that a plain derangement could change nothing."""
    drawn = rng.permutation(chosen)
    for _ in range(ROUNDS):
        clashes = np.flatnonzero(labels[drawn] == labels[chosen])
        if not len(clashes):
            return drawn
        for clash, other in zip(clashes, rng.integers(len(chosen), size=len(clashes)), strict=True):
            drawn[clash], drawn[other] = drawn[other], drawn[clash]
    raise DataError(
        f"data.noise.swap={share} chooses {len(chosen)} of {len(labels)} records, and their captions cannot be "
        "exchanged between different labels; choose a larger share, or 0"
    )


def _pairs(labels: np.ndarray, classes: np.ndarray, free: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(m, 2) int64: as many pairs of records as there can be, each of one class and two labels, in random order; no
    record is in two."""
    _, numbers = np.unique(labels[free], return_inverse=True)
    by_label = rng.permutation(numbers.max() + 1)[numbers]
    order = free[np.lexsort((rng.random(len(free)), by_label, classes[free]))]
    _, start, of, count = np.unique(classes[order], return_index=True, return_inverse=True, return_counts=True)
    # Of a class, label by label, the first half meets the second: where one label has no majority, always another one.
    half = count // 2
    first = np.flatnonzero(np.arange(len(order)) - start[of] < half[of])
    second = first + (count - half)[of[first]]
    pairs = np.stack([order[first], order[second]], axis=1)
    return rng.permutation(pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]])


def _strangers(labels: np.ndarray, chosen: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A random record of another label for each of the chosen."""
    drawn = rng.integers(len(labels), size=len(chosen))
    for _ in range(ROUNDS):
        clashes = np.flatnonzero(labels[drawn] == labels[chosen])
        if not len(clashes):
            return drawn
        drawn[clashes] = rng.integers(len(labels), size=len(clashes))
    raise DataError(f"data.noise.wrong_word={share}, but (nearly) all records have one label; allowed: 0")


def _keywords(captions: tuple[str, ...]) -> list[str]:
    """The captions that are one word, as tags are, or else the words of the first one: others may be sentences around
    it, whose words tell nothing of the picture."""
    return _words(tuple(text for text in captions if " " not in text) or captions[:1])


def _words(captions: tuple[str, ...]) -> list[str]:
    """Each once; of a caption without letters or digits, what stands between its spaces."""
    return list(dict.fromkeys(word for text in captions for word in re.findall(r"\w[\w'-]*", text) or text.split()))


def _word(words: list[str], rng: np.random.Generator) -> str:
    """One of them, of three letters or more where there is such a one: "of" would say nothing."""
    long = [word for word in words if len(word) > 2] or words
    return long[rng.integers(len(long))]


def _with_a_word(own: tuple[str, ...], others: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    """Captions with a keyword of `others` that is no word of theirs, the same in each. A caption's only word stays."""
    known = {word.lower() for word in _words(own)}
    foreign = _keywords(others)
    word = _word([word for word in foreign if word.lower() not in known] or foreign, rng)
    where, in_place = rng.random(), rng.random() < 0.5
    made = []
    for caption in own:
        words = caption.split()
        at = int(where * len(words))
        replaced = 1 if in_place and len(words) > 1 else 0
        words[at : at + replaced] = [word]
        made.append(" ".join(words))
    return tuple(dict.fromkeys(made))
