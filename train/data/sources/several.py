"""Several sources, one after another."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from ..record import Record, Source


class Concatenated:
    """All records of the first source, then those of the next. `lengths`: how many each has. Labels mean the same in
    all of them; keys begin with the number of the source, from 1."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self.lengths = tuple(map(len, sources))
        self._starts = [0, *accumulate(self.lengths)]
        self.left_out: dict[str, int] = dict(sum((Counter(source.left_out) for source in sources), Counter[str]()))
        self.fingerprint = hashlib.sha256(" ".join(source.fingerprint for source in sources).encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> Record:
        number = bisect_right(self._starts, index) - 1
        record = self._sources[number].read(index - self._starts[number])
        return replace(record, key=f"{number + 1}:{record.key}")

    def labels(self) -> np.ndarray | None:
        return _joined(source.labels() for source in self._sources)

    def classes(self) -> np.ndarray | None:
        return _joined(source.classes() for source in self._sources)


def _joined(parts: Iterable[np.ndarray | None]) -> np.ndarray | None:
    every = []
    for part in parts:
        if part is None:
            return None
        every.append(part)
    return np.concatenate(every)
