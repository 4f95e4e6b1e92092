"""A tiny data set in the form of the emoji set, and a configuration small enough to train on it in seconds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.data.shards import write_shard

SIZE = 16
CONCEPTS = 40
GROUPS = ("animals", "food", "objects", "flags")
VENDORS = {"train": ("noto", "twemoji"), "heldout": ("openmoji",), "vendor": ("fluent",), "concepts": ("noto",)}


def picture(concept: int, vendor: str) -> bytes:
    """A PNG of SIZE × SIZE: the concept is its pattern, the vendor a little noise."""
    pattern = np.random.default_rng(concept).integers(0, 256, (4, 4, 4)).repeat(SIZE // 4, 0).repeat(SIZE // 4, 1)
    noise = np.random.default_rng([concept, *vendor.encode()]).integers(-10, 10, pattern.shape)
    buffer = io.BytesIO()
    Image.fromarray((pattern + noise).clip(0, 255).astype(np.uint8), "RGBA").save(buffer, "PNG")
    return buffer.getvalue()


def make_data(folder: Path, concepts: int = CONCEPTS, without_caption: int = 0) -> Path:
    """`concepts` seen concepts and 10 unseen ones, in all four splits, each a shard; the first `without_caption`
    samples of each have nothing for captions but characters that are taken out."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, vendors in VENDORS.items():
        ids = range(concepts, concepts + 10) if split == "concepts" else range(concepts)
        drawn = [(concept, vendor) for concept in ids for vendor in vendors]
        samples = [sample(split, *one, captionless=index < without_caption) for index, one in enumerate(drawn)]
        write_shard(shard_of(folder, split), samples)
    classes = {
        group: [f"thing {one}" for one in range(concepts) if GROUPS[one % len(GROUPS)] == group] for group in GROUPS
    }
    (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def sample(split: str, concept: int, vendor: str, captionless: bool = False) -> tuple[str, dict[str, bytes]]:
    """Of a shard: its key, and its files by suffix."""
    captions = [f"thing {concept}", f"a drawing of thing {concept}", f"{split} word {concept % 7}"]
    record = {
        "captions": ["\0\ufeff"] if captionless else captions,
        "label": concept,
        "class": GROUPS[concept % len(GROUPS)],
        "vendor": vendor,
    }
    files = {
        "png": picture(concept, vendor),
        "txt": record["captions"][0].encode(),
        "json": json.dumps(record).encode(),
    }
    return f"{split}-{concept}-{vendor}", files


def shard_of(folder: Path, split: str) -> Path:
    return folder / f"{split}-000000.tar"


def tiny(folder: Path, **job: Any) -> dict[str, dict[str, Any]]:
    """The sections of a configuration that trains on `make_data` in well under a second a step."""
    return {
        "data": {
            "source": str(shard_of(folder, "train")),
            "distinct": "label",
            "evaluate": {split: str(shard_of(folder, split)) for split in ("heldout", "vendor", "concepts")},
            "classes": str(folder / "classes.json"),
            "max_bad_fraction": 0.1,
        },
        "model": {
            "image_size": SIZE,
            "embed_dim": 16,
            "image_widths": [8, 16],
            "text_width": 16,
            "text_layers": 1,
            "text_heads": 2,
            "vocab_size": 300,
        },
        "loss": {"hard_steps": 2, "rise_steps": 8, "alpha_end": 0.5},
        "optimizer": {"steps": 12, "batch_size": 16, "warmup_steps": 2},
        "job": {"device": "cpu", "checkpoint_every": 4, "evaluate_every": 6, "timeout_seconds": 60, **job},
    }
