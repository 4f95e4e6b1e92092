"""Which prepared folder a run reads, and the splits held out of training that it is evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import Config, ConfigError
from .emoji import prepare_emoji
from .manifest import DataError, read_manifest
from .pairs import Pairs, load_pairs

HELD_OUT = {"heldout": "held-out drawings", "vendor": "unseen vendor", "concepts": "unseen concepts"}  # split: in words


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation reads.

    splits    the held-out splits by name
    groups    each subject group in words; see describe_groups
    left_out  the bad samples that were left out of each split and of `train`, counted by reason
    """

    splits: dict[str, Pairs]
    groups: list[list[str]]
    left_out: dict[str, dict[str, int]]


def data_folder(config: Config) -> Path:
    """The prepared data of a run: its own folder, or the emoji set, fetched and drawn if that was never done. Raises
    ConfigError where the pictures are of another size than configured."""
    if config.data.folder is None:
        return prepare_emoji(size=config.data.image_size, seed=config.data.seed)
    folder = Path(config.data.folder)
    size = read_manifest(folder).size
    if size != config.data.image_size:
        raise ConfigError(
            f"data.image_size={config.data.image_size}, but the pictures of {folder} have {size} pixels a side; "
            f"set data.image_size={size}"
        )
    return folder


def read_held_out(config: Config, folder: Path, train: Pairs | None = None) -> HeldOut:
    """All that an evaluation needs of a prepared folder. `train`: the training split, if it is in memory already.
    Raises DataError where a split is missing, empty or has too many bad samples."""
    missing = sorted(HELD_OUT.keys() - read_manifest(folder).shards.keys())
    if missing:
        raise DataError(
            f"{folder} lacks the splits {', '.join(missing)}, which the evaluation needs; give data that hold "
            f"{', '.join(HELD_OUT)} besides train"
        )
    limit = config.data.max_bad_fraction
    splits = {split: load_pairs(folder, split, max_bad_fraction=limit) for split in HELD_OUT}
    if train is None or train.corrupted.any():  # corrupted captions do not describe the groups of their pictures
        train = load_pairs(folder, "train", max_bad_fraction=limit)
    left_out = {"train": train.bad, **{split: pairs.bad for split, pairs in splits.items()}}
    return HeldOut(splits, describe_groups(train), left_out)


def describe_groups(train: Pairs) -> list[list[str]]:
    """Each group in words: the labels of its concepts in the training split, or its name where it has none there."""
    words: list[list[str]] = [[] for _ in train.group_names]
    for label, group in sorted(set(zip((texts[0] for texts in train.captions), train.groups.tolist(), strict=True))):
        words[group].append(label)
    return [labels or [name.replace("-", " and ")] for labels, name in zip(words, train.group_names, strict=True)]
