"""What each training step reads: functions of (seed, step) alone, whatever the number of ranks and of workers, so that
a resumed run needs no state to go on with the same batches.

An epoch's order is a keyed permutation that is computed one position at a time (a Feistel network over 2k bits, whose
values beyond the epoch are walked on until they lie in it). So an epoch of 10 million pairs costs neither memory nor a
pause where it begins, and every worker may draw any step by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..options import ConfigError

DRAWS, ORDER = 1, 2  # Philox's streams of one key, besides the PSD partition's, which is 0
ROUNDS = 8
KEPT_STEPS = 4  # whose draws are kept: those of the step in work, and of a few more that gave replacements


@dataclass(frozen=True)
class Draw:
    """One sample: the number of its record; `caption`: which of the captions, a number in [0, 1); `seed`: of its
    augmentation."""

    record: int
    caption: float
    seed: int


@dataclass(frozen=True)
class Draws:
    """The samples of a step, over all ranks: `record` and `seed` are (B,) int64, `caption` is (B,) float64."""

    record: np.ndarray
    caption: np.ndarray
    seed: np.ndarray

    def __len__(self) -> int:
        return len(self.record)

    def at(self, position: int) -> Draw:
        return Draw(int(self.record[position]), float(self.caption[position]), int(self.seed[position]))


class StepSampler:
    """Draws batches of `batch_size` from sources that lie one after another, n_i records in the i-th of them.

    lengths  n_i
    weights  w_i of each source, or none for 1: how often an epoch takes its records. Of a source of which an epoch
             takes less than all, the next epoch takes the records after those, so that all have their turn
    labels   (n,) int64: an epoch takes each label once, by one of its records drawn at random. None: each record
             once. Two records of one label in one batch would be each other's negatives

    No batch takes a record, or a label, twice. Memory is O(1) beyond what is given here, with labels 24 bytes a record.
    Raises ConfigError where a batch needs more than there is.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        weights: Sequence[float] = (),
        labels: np.ndarray | None = None,
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._kept: OrderedDict[int, tuple[np.ndarray, Draws]] = OrderedDict()
        self._labels = None if labels is None else _Runs(labels)
        if self._labels is not None:
            if any(weight != 1.0 for weight in weights):
                raise ConfigError(
                    f"data.weights={list(weights)} with data.distinct='label', of which an epoch takes each label once "
                    "whatever its source; allowed: one of them"
                )
            lengths, weights = [len(self._labels.counts)], ()
        self._parts = _Parts(lengths, weights)
        if self._parts.length < batch_size:
            what = "labels" if labels is not None else "pairs"
            raise ConfigError(
                f"optimizer.batch_size={batch_size}; allowed: at most {self._parts.length}, the number of {what} that "
                f"the training data hold, since a batch takes each of them once"
            )

    @property
    def epoch_length(self) -> int:
        """Samples of an epoch."""
        return self._parts.epoch_length

    def draw(self, step: int) -> Draws:
        """The global batch of a step."""
        return self._things_and_draws(step)[1]

    def spare(self, step: int, position: int, attempt: int) -> Draw | None:
        """What stands in for the sample at `position` of a step's batch if its record is bad: the one that has this
        position `attempt` steps later (1 or more); None where this step's batch holds that already."""
        things, draws = self._things_and_draws(step + attempt)
        return None if things[position] in self._things_and_draws(step)[0] else draws.at(position)

    def _things_and_draws(self, step: int) -> tuple[np.ndarray, Draws]:
        if step not in self._kept:
            while len(self._kept) >= KEPT_STEPS:
                self._kept.popitem(last=False)
            self._kept[step] = self._compute(step)
        return self._kept[step]

    def _compute(self, step: int) -> tuple[np.ndarray, Draws]:
        things = batch_indices(self._parts.length, self.batch_size, step, self.seed, self._parts.record)
        random = np.random.Generator(_philox(self.seed, step, DRAWS))
        which, captions = random.random((2, self.batch_size))
        seeds = random.integers(2**62, size=self.batch_size)
        records = things if self._labels is None else self._labels.pick(things, which)
        return things, Draws(records, captions, seeds)


class _Runs:
    """The records of each label, side by side."""

    def __init__(self, labels: np.ndarray) -> None:
        self.records = np.argsort(labels, kind="stable")
        _, self.first, self.counts = np.unique(labels[self.records], return_index=True, return_counts=True)

    def pick(self, of: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """A record of each of the labels `of`, these counted in their order, as the numbers in [0, 1) say."""
        return self.records[self.first[of] + (draws * self.counts[of]).astype(np.int64)]


class _Parts:
    """What an epoch takes of sources with weights. Where a weight is above 1 an epoch consists of several parts, of
    which none takes a record twice; batches are cut from parts. Part e takes m_i records of source i: those that follow
    on the ones of part e - 1, around the source's end.

    length        records of a part
    epoch_length  records of an epoch
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float]) -> None:
        weights = weights or [1.0] * len(lengths)
        parts = max(1, int(np.ceil(max(weights))))
        taken = [max(1, round(w * n / parts)) if n else 0 for w, n in zip(weights, lengths, strict=True)]
        self._lengths, self._taken = np.array(lengths, dtype=np.int64), np.array(taken, dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._ends = np.cumsum(self._taken)
        self.length = sum(taken)
        self.epoch_length = parts * self.length

    def record(self, part: int, entries: np.ndarray) -> np.ndarray:
        """The record of each entry, 0 to length - 1, of a part; different ones for different entries."""
        source = np.searchsorted(self._ends, entries, side="right")
        taken = self._taken[source]
        entry = entries - (self._ends[source] - taken)
        return self._starts[source] + (part * taken + entry) % self._lengths[source]


def batch_indices(
    n: int,
    batch: int,
    step: int,
    seed: int,
    thing: Callable[[int, np.ndarray], np.ndarray] = lambda _, entries: entries,
) -> np.ndarray:
    """(batch,) int64, batch <= n: what the global batch of a step takes, a pure function of the arguments.

    thing  of (epoch, entries of it, 0 to n - 1): what they are in this epoch; different ones for different entries

    Epochs, each with n entries in an order of its own, follow one another without a gap, and a batch may lie across
    two; no batch takes a thing twice. For n < 2 * batch each step takes the first `batch` of an epoch of its own, since
    two batches in a row must then share some.
    """
    if not 1 <= batch <= n or step < 0 or seed < 0:
        raise ValueError(f"batch={batch} must lie in [1, n={n}], and step={step} and seed={seed} must be at least 0")

    def at(epoch: int, positions: np.ndarray) -> np.ndarray:
        return thing(epoch, permuted(positions, n, seed, epoch))

    if n < 2 * batch:
        return at(step, np.arange(batch))
    epoch, offset = divmod(step * batch, n)
    first = at(epoch, _exchanged(offset, min(offset + batch, n), n, batch, epoch, at))
    left = batch - len(first)
    return np.concatenate([first, at(epoch + 1, _exchanged(0, left, n, batch, epoch + 1, at))]) if left else first


def _exchanged(
    start: int, end: int, n: int, batch: int, epoch: int, at: Callable[[int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Positions `start` to `end` of an epoch's order, with exchanges such that the batch across the epoch's start
    repeats nothing.

    That batch takes the last things of the epoch before and the first of this one. First things that are among those
    last ones change places with things from the middle, never from this epoch's own end, on which the next epoch
    relies; so an order follows from two permutations and needs no walk through the epochs before.
    """
    positions = np.arange(start, end)
    head = -epoch * n % batch  # things of this epoch in the batch across its start
    if not head or start >= 2 * batch:  # places are changed among the first 2 * batch only
        return positions
    before = at(epoch - 1, np.arange(n - (batch - head), n))
    middle = np.arange(head, min(2 * batch, n - (epoch + 1) * n % batch))
    clashes = np.flatnonzero(np.isin(at(epoch, np.arange(head)), before))
    free = middle[~np.isin(at(epoch, middle), before)][: len(clashes)]
    for ours, theirs in ((clashes, free), (free, clashes)):
        here = (start <= ours) & (ours < end)
        positions[ours[here] - start] = theirs[here]
    return positions


def permuted(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """What lies at these positions, 0 to n - 1, of a random permutation of n things: (len(positions),) int64."""
    half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = _philox(seed, epoch, ORDER).random_raw(ROUNDS)
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):  # at most 4 times as many values are possible as there are things
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        values[outside] = left << half | right
        outside = outside[values[outside] >= n]
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A hash of 64 bits (the finalizer of SplitMix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _philox(seed: int, number: int, stream: int) -> np.random.Philox:
    """Numpy's Philox is counter-based: (seed, number) is its state."""
    return np.random.Philox(key=[seed, number], counter=[0, 0, 0, stream])
