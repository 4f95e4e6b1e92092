"""The default data set: real image-text pairs, emoji drawn by several vendors with their names and keywords.

Fetched and drawn once by ``prepare_emoji`` (or ``python -m train.data``) into a cache outside the repository, then
loaded by ``load_pairs``. The splits and their rules are described in ``train.data.splits``.
"""

from train.data.batches import augment, batch_indices, composite
from train.data.manifest import DataError
from train.data.pairs import Pairs, describe_bad, load_pairs
from train.data.prepare import prepare_emoji
from train.data.sources import SetupError

__all__ = [
    "DataError",
    "Pairs",
    "SetupError",
    "augment",
    "batch_indices",
    "composite",
    "describe_bad",
    "load_pairs",
    "prepare_emoji",
]
