"""The batches of the steps, read and prepared ahead of them.

A rank's share of a batch is made in chunks, so that several workers have a part in each step, and a large batch does
not lie in memory many times over. What a sample is follows from the sampler's draws alone; so neither the workers, nor
their number, nor that of the ranks changes a batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..options import DataOptions
from ..towers.bundle import Prepare
from ..world import World
from .images import decode
from .record import BadRecordError, DataError, Source, describe_bad
from .sampler import Draw, StepSampler
from .workers import count_workers, produce

CHUNK = 64  # samples, but for shares so large that they would need more than MOST_CHUNKS
MOST_CHUNKS = 128  # of a share: each travels with two file descriptors for each of the towers that it is made for, of
# which a process may often have 1024
REPLACEMENTS = 100  # that are tried for one bad record
TRIAL = 64


View: TypeAlias = tuple[Tensor, Tensor]  # pictures (b, 3, H, W) float32, captions (b, L) int64


@dataclass(frozen=True)
class Batch:
    """A rank's share of a step's batch, b pairs.

    images  (b, 3, H, W) float32
    tokens  (b, L) int64
    labels  (b,) int64, Record.label; -1 where a record has none
    noise   (b,) int64, Record.noise
    views   the same pictures and captions as other towers take them, of each teacher in turn, under one augmentation
            seed
    keys    names the records of the share
    bad     the records that others stand in for, counted by reason
    """

    images: Tensor
    tokens: Tensor
    labels: Tensor
    noise: Tensor
    views: tuple[View, ...]
    keys: tuple[str, ...]
    bad: dict[str, int]


@dataclass(frozen=True)
class Chunk:
    """A part of a share, on the CPU. `tensors`: images and tokens, then those of each view; `facts`: (2, b) int64,
    labels and noise, no tensor, since each that a worker hands over takes a file descriptor."""

    tensors: tuple[Tensor, ...]
    facts: np.ndarray
    keys: tuple[str, ...]
    bad: dict[str, int]

    def pin_memory(self) -> Chunk:
        return replace(self, tensors=tuple(tensor.pin_memory() for tensor in self.tensors))


Batches: TypeAlias = Generator[Batch, None, None]
Items: TypeAlias = Generator[Chunk | DataError, None, None]
Tokenize: TypeAlias = Callable[[Sequence[str]], Tensor]


class Sample(NamedTuple):
    """A pair, read: `seed` is that of the augmentation; label and noise as in a Batch."""

    key: str
    picture: Image.Image
    caption: str
    seed: int
    label: int = -1
    noise: int = 0


@dataclass(frozen=True)
class Reading:
    """How records become what the towers read.

    prepare     of the towers' bundle
    tokenize    likewise
    max_pixels  a larger picture is bad
    views       of other towers, which read the same: their own prepare and tokenize
    """

    prepare: Prepare
    tokenize: Tokenize
    max_pixels: int
    views: tuple[tuple[Prepare, Tokenize], ...] = ()

    def chunk(self, samples: Sequence[Sample], bad: dict[str, int]) -> Chunk:
        keys, pictures, captions, seeds, labels, noise = zip(*samples, strict=True)
        drawn = np.array(seeds, dtype=np.int64)
        made = [
            (prepare(pictures, drawn), tokenize(captions))
            for prepare, tokenize in ((self.prepare, self.tokenize), *self.views)
        ]
        facts = np.array([labels, noise], dtype=np.int64)
        return Chunk(tuple(tensor for view in made for tensor in view), facts, keys, bad)


class Loader:
    """This rank's batches, from records that are read at random; `options`: those of the workers."""

    def __init__(
        self, source: Source, sampler: StepSampler, reading: Reading, options: DataOptions, world: World
    ) -> None:
        self._device, self._prefetch = world.device, options.prefetch
        self.workers = count_workers(options, world.device, world.ranks_here)
        share = sampler.batch_size // world.size
        self._ends = chunk_ends(share, 1 + len(reading.views))
        self._chunks = _Chunks(source, sampler, reading, world.rank * share, self._ends)

    def batches(self, first: int, last: int) -> Batches:
        """Those of the steps `first` to `last` - 1, in order. The worker processes start with the first one, and end
        with the iterator: close it. Raises DataError where the source is broken or too much of it is bad, WorkerError
        where a worker process is lost."""
        chunks = len(self._ends)
        items = produce(
            self._chunks,
            range(first * chunks, last * chunks),
            workers=self.workers,
            ahead=self._prefetch * chunks,
            pin=self._device.type == "cuda",
        )
        return joined(items, self._ends, self._device)


class _Chunks(Dataset[Chunk | DataError]):
    """Chunk number `step * chunks + part` of a rank's shares. An error is handed over as a value: DataLoader would turn
    it into its traceback."""

    def __init__(self, source: Source, sampler: StepSampler, reading: Reading, start: int, ends: Sequence[int]) -> None:
        self._source, self._sampler, self._reading = source, sampler, reading
        self._start, self._ends = start, ends

    def __getitem__(self, number: int) -> Chunk | DataError:
        step, part = divmod(number, len(self._ends))
        start = self._start + (self._ends[part - 1] if part else 0)
        bad: Counter[str] = Counter()
        try:
            samples = [self._sample(step, at, bad) for at in range(start, self._start + self._ends[part])]
        except DataError as error:
            return error
        return self._reading.chunk(samples, dict(bad))

    def _sample(self, step: int, position: int, bad: Counter[str]) -> Sample:
        """The one at this position of the step's batch, or the first good one of those that stand in for it."""
        draw: Draw | None = self._sampler.draw(step).at(position)
        tried: Counter[str] = Counter()
        for attempt in range(1, REPLACEMENTS + 1):
            if draw is not None:
                try:
                    return self._read(draw)
                except BadRecordError as error:
                    tried[str(error.args[0])] += 1
                    bad[str(error.args[0])] += 1
            draw = self._sampler.spare(step, position, attempt)
        raise DataError(
            f"step {step} has a bad record, and none of {REPLACEMENTS} others can stand in for it: {tried.total() - 1} "
            f"are bad as well ({describe_bad(tried)}), and the batch holds the others already; repair the data, or "
            "lower optimizer.batch_size where a batch takes nearly all of them"
        )

    def _read(self, draw: Draw) -> Sample:
        record = self._source.read(draw.record)
        picture = decode(record.image, self._reading.max_pixels)
        caption = record.captions[int(draw.caption * len(record.captions))]
        label = -1 if record.label is None else record.label
        return Sample(record.key, picture, caption, draw.seed, label, record.noise)


def chunk_ends(share: int, towers: int = 1) -> list[int]:
    """Where the chunks of a share end that are made for so many pairs of towers."""
    size = max(CHUNK, math.ceil(share * towers / MOST_CHUNKS))
    return [*range(size, share, size), share]


def joined(items: Items, ends: Sequence[int], device: torch.device) -> Batches:
    """Each len(ends) chunks as one batch on the device. Raises the errors among them."""
    try:
        while True:
            keys: list[str] = []
            facts: list[np.ndarray] = []
            bad: Counter[str] = Counter()
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                chunk = next(items, None)
                if chunk is None:
                    return
                if isinstance(chunk, DataError):
                    raise chunk
                if start == 0:
                    tensors = [part.new_empty((ends[-1], *part.shape[1:]), device=device) for part in chunk.tensors]
                for tensor, part in zip(tensors, chunk.tensors, strict=True):
                    tensor[start:end].copy_(part, non_blocking=True)
                facts.append(chunk.facts)
                keys += chunk.keys
                bad.update(chunk.bad)
            images, tokens, *others = tensors
            labels, noise = torch.from_numpy(np.concatenate(facts, axis=1)).to(device)
            views = tuple(zip(others[::2], others[1::2], strict=True))
            yield Batch(images, tokens, labels, noise, views, tuple(keys), dict(bad))
    finally:
        items.close()


def trial(source: Source, options: DataOptions) -> None:
    """Read a few records all over a source. Raises DataError where more than half of them are bad, so that a wrong
    column or suffix is seen before the first step."""
    indices = np.linspace(0, len(source) - 1, min(TRIAL, len(source)), dtype=np.int64)
    bad: Counter[str] = Counter()
    for index in indices.tolist():
        try:
            decode(source.read(index).image, options.max_pixels)
        except BadRecordError as error:
            bad[str(error.args[0])] += 1
    if bad.total() > len(indices) / 2:
        raise DataError(
            f"of {len(indices)} records all over data.source={options.source!r}, {bad.total()} are bad "
            f"({describe_bad(bad)}); see whether data.image_key, data.text_key, data.image_column and "
            "data.caption_column name what it holds, or repair it"
        )
