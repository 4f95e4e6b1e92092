"""A split in memory: decoded pictures with all their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .manifest import DataError, read_manifest
from .shards import BadCount, read_shard

DERANGEMENT_ROUNDS = 1000


@dataclass(frozen=True)
class Pairs:
    """A split of n image-text pairs.

    images       (n, 4, H, W) uint8 RGBA, not premultiplied
    captions     all captions of each image, the canonical one (unique to its concept) first
    concepts     (n,) int64; equal ids mean the same concept, also between splits. It tells what the image shows, also
                 where the captions were corrupted
    groups       (n,) int64, index into `group_names`
    group_names  the subject groups (of the emoji set: smileys, animals, food, ...)
    vendors      vendor name of each image
    keys         sample ids, unique between splits too
    corrupted    (n,) bool; True where the captions are those of another concept
    bad          skipped samples, counted by reason
    """

    images: torch.Tensor
    captions: list[tuple[str, ...]]
    concepts: torch.Tensor
    groups: torch.Tensor
    group_names: tuple[str, ...]
    vendors: tuple[str, ...]
    keys: tuple[str, ...]
    corrupted: torch.Tensor
    bad: dict[str, int]

    def __len__(self) -> int:
        return len(self.keys)


def all_captions(pairs: Pairs) -> list[str]:
    """The captions of all pairs, sorted, each once: what the tokenizer is trained on."""
    return sorted({text for captions in pairs.captions for text in captions})


def describe_bad(bad: dict[str, int]) -> str:
    """Skipped samples in words, by reason, the most frequent first."""
    if not bad:
        return "none"
    reasons = sorted(bad.items(), key=lambda entry: -entry[1])
    return f"{sum(bad.values())} ({', '.join(f'{reason} {count}' for reason, count in reasons)})"


def corruption_sources(concepts: Sequence[int], share: float, seed: int) -> np.ndarray:
    """(n,) int64: whose captions each sample gets, itself where it is left alone.

    `round(share * n)` samples exchange captions among themselves, each with one of another concept (another vendor's
    drawing of the same concept carries the same captions, so that a plain derangement could change nothing). Raises
    DataError where no such exchange was found, because one concept holds too many of the chosen samples.
    """
    ids = np.asarray(concepts, dtype=np.int64)
    source = np.arange(len(ids))
    rng = np.random.default_rng([seed, 0xC0])
    chosen = rng.permutation(len(ids))[: round(share * len(ids))]
    if not len(chosen):
        return source
    drawn = rng.permutation(chosen)
    for _ in range(DERANGEMENT_ROUNDS):
        clashes = np.flatnonzero(ids[drawn] == ids[chosen])
        if not len(clashes):
            source[chosen] = drawn
            return source
        for clash, other in zip(clashes, rng.integers(len(chosen), size=len(clashes)), strict=True):
            drawn[clash], drawn[other] = drawn[other], drawn[clash]
    raise DataError(
        f"corrupt={share} chooses {len(chosen)} of {len(ids)} samples, and their captions cannot be exchanged between "
        "different concepts; choose a larger share, or 0"
    )


def load_pairs(
    folder: Path, split: str, *, corrupt: float = 0.0, seed: int = 0, max_bad_fraction: float = 0.01
) -> Pairs:
    """Load a split of a prepared folder: one made by `prepare_emoji`, or laid out like it.

    folder            a folder with a manifest and the shards that it names
    split             one of the manifest's splits: of the emoji set `train`, `heldout`, `concepts` or `vendor`
    corrupt           share of the training captions to exchange between concepts, 0 to 1; see corruption_sources
    seed              fixes which captions are corrupted and how
    max_bad_fraction  the load stops once more than this share of the split's samples is bad

    Raises DataError where no set-up was finished, a split or shard is missing, too many samples are bad or captions
    cannot be exchanged; ValueError where an argument is out of range.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if split not in manifest.shards:
        raise DataError(f"split is {split!r}; {folder} holds {', '.join(map(repr, sorted(manifest.shards)))}")
    if not 0.0 <= corrupt <= 1.0:
        raise ValueError(f"corrupt is {corrupt!r}; a share from 0 to 1 is allowed")
    if corrupt and split != "train":
        raise ValueError(f"corrupt is {corrupt!r} for the split {split!r}; only 'train' may be corrupted, use 0")
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"max_bad_fraction is {max_bad_fraction!r}; a share from 0 to 1 is allowed")
    shards = manifest.shards[split]
    bad = BadCount(sum(shard.samples for shard in shards), max_bad_fraction, f"the split {split!r}")
    seen: set[str] = set()
    samples = []
    for shard in shards:
        for sample in read_shard(folder, shard, manifest.size, seen, bad):
            if sample.group in manifest.group_names:
                samples.append(sample)
            else:
                bad.add("unknown_group")
    if not samples:
        raise DataError(f"the split {split!r} of {folder} holds no sample; give a folder where it holds some")
    source = corruption_sources([sample.concept for sample in samples], corrupt, seed)
    images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    return Pairs(
        images=images.permute(0, 3, 1, 2).contiguous(),
        captions=[samples[i].captions for i in source],
        concepts=torch.tensor([sample.concept for sample in samples], dtype=torch.int64),
        groups=torch.tensor([manifest.group_names.index(sample.group) for sample in samples], dtype=torch.int64),
        group_names=manifest.group_names,
        vendors=tuple(sample.vendor for sample in samples),
        keys=tuple(sample.key for sample in samples),
        corrupted=torch.from_numpy(source != np.arange(len(samples))),
        bad=dict(bad.reasons),
    )
