"""The data of a run, from files to batches.

record      an image-text pair, and what every source of them offers
sources/    one for each layout: shards, folders, tables, Arrow, and several together
captions    the rules by which text is cleaned
images      pictures decoded, within limits
sampler     which records each step takes: a function of (seed, step)
noise       captions made wrong on purpose
loader      the batch of each step
workers     the processes that read and prepare
stream      batches of what cannot be read at random
training    all that together: what a run is trained on
shards      the writer of shards
emoji/      the default set: real image-text pairs, fetched and drawn once, by `python -m train data` or on demand
"""

from .emoji import SetupError, prepare_emoji
from .images import decode
from .loader import Batch, Loader
from .record import BadRecordError, DataError, Record, Source, count_bad
from .sampler import StepSampler, batch_indices
from .sources import open_source
from .training import TrainingData, open_training_data

__all__ = [
    "BadRecordError",
    "Batch",
    "DataError",
    "Loader",
    "Record",
    "SetupError",
    "Source",
    "StepSampler",
    "TrainingData",
    "batch_indices",
    "count_bad",
    "decode",
    "open_source",
    "open_training_data",
    "prepare_emoji",
]
