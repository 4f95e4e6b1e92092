"""The data of a run, from files to batches.

emoji/     the default set: real image-text pairs, fetched and drawn once, by `python -m train.data` or on demand
manifest   what a folder of prepared data holds
shards     its tar files, written and read; what is corrupt is skipped and counted, what is hostile does no harm
captions   the rules by which text is cleaned
pairs      a split in memory
run_data   which folder a run reads, and the splits that it is evaluated on
sampler    the batch of each step, and a rank's share of it
augment    how pictures reach the model
"""

from .augment import augment, composite
from .emoji import SetupError, prepare_emoji
from .manifest import DataError
from .pairs import Pairs, all_captions, describe_bad, load_pairs
from .run_data import HeldOut, data_folder, read_held_out
from .sampler import Batch, Sampler, batch_indices

__all__ = [
    "Batch",
    "DataError",
    "HeldOut",
    "Pairs",
    "Sampler",
    "SetupError",
    "all_captions",
    "augment",
    "batch_indices",
    "composite",
    "data_folder",
    "describe_bad",
    "load_pairs",
    "prepare_emoji",
    "read_held_out",
]
