"""What a run is trained on: the batch of each step, and the account of what is bad in it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import Config
from ..heartbeat import tick
from ..options import ConfigError
from ..towers.bundle import Bundle
from ..world import World
from .loader import Batches, Loader, Reading, trial
from .noise import Noisy
from .record import BadRecordError, DataError, count_bad, describe_bad
from .sampler import StepSampler
from .sources import open_source
from .stream import SCHEME, Stream, shards_of

CAPTIONS_READ = 200_000  # records at most that a tokenizer is trained on


class TrainingData(ABC):
    """`fingerprint`: hex SHA-256 of what it holds; `epoch_length`: in samples; `noisy`: what captions are made wrong
    by."""

    fingerprint: str
    epoch_length: int
    noisy: Noisy | None = None

    def __init__(self, config: Config) -> None:
        self._config = config

    def batches(self, bundle: Bundle, world: World, first: int, last: int, teachers: Sequence[Bundle] = ()) -> Batches:
        """This rank's share of the batches of steps `first` to `last` - 1, in order; each of `teachers` has a view of
        them."""
        views = tuple((teacher.prepare, teacher.tokenize) for teacher in teachers)
        reading = Reading(bundle.prepare, bundle.tokenize, self._config.data.max_pixels, views)
        return self._loader(reading, world).batches(first, last)

    @abstractmethod
    def captions(self) -> Iterable[str]:
        """What a tokenizer is trained on."""

    @abstractmethod
    def describe(self) -> str:
        """How much there is, in words."""

    @abstractmethod
    def _loader(self, reading: Reading, world: World) -> Any: ...

    def check_bad(self, bad: int, steps: int, reasons: Mapping[str, int]) -> None:
        """Raises DataError where, of all samples of `steps` steps, and of an epoch at least, too many were bad."""
        limit = self._config.data.max_bad_fraction
        read = max(self.epoch_length, steps * self._config.optimizer.batch_size)
        if bad > limit * read:
            raise DataError(
                f"{bad} of the samples read so far were bad, the last for {describe_bad(reasons)}; allowed: the "
                f"fraction {limit} of {read}; repair or leave out these samples, or raise data.max_bad_fraction"
            )


def open_training_data(config: Config) -> TrainingData:
    """Raises DataError or ConfigError where the data cannot be read, are mostly bad, or too few for a batch."""
    return Streamed(config) if config.data.source.startswith(SCHEME) else Indexed(config)


class Indexed(TrainingData):
    """A source that is read at random: what a step takes is a function of (seed, step)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        options = config.data
        self.source = open_source(options.source, options)
        trial(self.source, options)
        labels = self._labels("data.distinct", "none") if options.distinct == "label" else None
        if config.loss.positives == "label":
            self._labels("loss.positives", "pair")
        self.sampler = StepSampler(
            getattr(self.source, "lengths", [len(self.source)]),
            config.optimizer.batch_size,
            config.job.seed,
            weights=options.weights,
            labels=labels,
        )
        if options.noise:
            self.noisy = Noisy(self.source, options.noise, options.seed)
        self.fingerprint, self.epoch_length = self.source.fingerprint, self.sampler.epoch_length

    def _labels(self, option: str, other: str) -> np.ndarray:
        """Those that option=label needs."""
        labels = self.source.labels()
        if labels is None:
            raise ConfigError(
                f"{option}='label', but not every record of data.source={self._config.data.source!r} has a label; use "
                f"{option}={other}"
            )
        return labels

    def captions(self) -> Iterable[str]:
        """All captions, or those of CAPTIONS_READ records, evenly spaced; without noise, so that runs that differ in it
        alone have one tokenizer."""
        count = min(len(self.source), CAPTIONS_READ)
        for index in np.linspace(0, len(self.source) - 1, count).astype(int).tolist():
            tick()
            try:
                yield from self.source.read(index).captions
            except BadRecordError:
                continue  # it is counted when its batch is read

    def describe(self) -> str:
        wrong = f"; captions made wrong: {self.noisy.describe()}" if self.noisy is not None else ""
        return f"{len(self.source)} pairs (bad samples left out: {count_bad(self.source.left_out)}{wrong})"

    def _loader(self, reading: Reading, world: World) -> Loader:
        return Loader(self.noisy or self.source, self.sampler, reading, self._config.data, world)


class Streamed(TrainingData):
    """Shards without positions; see stream."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._urls = shards_of(config.data)
        if config.loss.positives == "label":
            raise ConfigError(f"loss.positives='label' with data.source={config.data.source!r}; allowed: 'pair'")
        names = [url.rpartition("/")[2] for url in self._urls]
        self.fingerprint = hashlib.sha256("\n".join(names).encode()).hexdigest()
        assert config.data.epoch_samples is not None
        self.epoch_length = config.data.epoch_samples

    def captions(self) -> Iterable[str]:
        raise ConfigError(
            f"model.towers={self._config.model.towers!r} trains a tokenizer on the captions, and "
            f"data.source={self._config.data.source!r} can only be read from end to end; use towers that bring their "
            "own tokenizer, or shards on disk"
        )

    def describe(self) -> str:
        return f"a stream of {len(self._urls)} shards"

    def _loader(self, reading: Reading, world: World) -> Stream:
        batch_size, seed = self._config.optimizer.batch_size, self._config.job.seed
        return Stream(batch_size, seed, reading, self._config.data, world)
