"""What a run is trained on: a source, the batch of each step, and the account of what is bad in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..config import Config
from ..heartbeat import tick
from ..towers import Bundle
from ..world import World
from .corruption import corruption_sources
from .loader import Batch, Loader, trial
from .record import BadRecordError, DataError, Source
from .sampler import StepSampler
from .sources import open_source

CAPTIONS_READ = 200_000  # records at most that a tokenizer is trained on


@dataclass(frozen=True)
class TrainingData:
    """`sampler` says which records each step takes of `source`."""

    source: Source
    sampler: StepSampler
    max_bad_fraction: float

    @property
    def epoch_length(self) -> int:
        """In records."""
        return self.sampler.epoch_length

    def captions(self) -> Iterable[str]:
        """All captions, or those of CAPTIONS_READ records, evenly spaced."""
        count = min(len(self.source), CAPTIONS_READ)
        for index in np.linspace(0, len(self.source) - 1, count).astype(int).tolist():
            tick()
            try:
                yield from self.source.read(index).captions
            except BadRecordError:
                continue  # it is counted when its batch is read

    def batches(self, bundle: Bundle, config: Config, world: World, first: int, last: int) -> Iterator[Batch]:
        """This rank's share of the batches of steps `first` to `last` - 1, in order."""
        loader = Loader(self.source, self.sampler, bundle, config.data, world)
        return loader.steps(first, last)

    def check_bad(self, bad: int, steps: int, reasons: Mapping[str, int]) -> None:
        """Raises DataError where, of all records read in `steps` steps, and of an epoch at least, too many were bad."""
        read = max(self.epoch_length, steps * self.sampler.batch_size)
        if bad > self.max_bad_fraction * read:
            raise DataError(
                f"{bad} of the samples read so far were bad, the last for {describe_bad(reasons)}; allowed: the "
                f"fraction {self.max_bad_fraction} of {read}; repair or leave out these samples, or raise "
                "data.max_bad_fraction"
            )

    def describe(self) -> str:
        return f"{len(self.source)} pairs (bad samples left out: {describe_bad(self.source.left_out)})"


def open_training_data(config: Config) -> TrainingData:
    """Raises DataError or ConfigError where the data cannot be read, are mostly bad, or too few for a batch."""
    options = config.data
    source = open_source(options.source, options)
    trial(source, options)
    labels = source.labels() if options.distinct == "label" or options.corrupt else None
    raise NotImplementedError


def describe_bad(bad: Mapping[str, int]) -> str:
    """Bad samples in words, by reason, the most frequent first."""
    if not bad:
        return "none"
    reasons = sorted(bad.items(), key=lambda entry: -entry[1])
    return f"{sum(bad.values())} ({', '.join(f'{reason} {count}' for reason, count in reasons)})"
