"""The towers of the emoji run, for pictures of things on a plain or no background.

model      convolutions and a small transformer
tokenizer  byte-level BPE, trained on the run's own captions
augment    pictures turned, scaled and shifted a little on a background
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import Tensor

from ...options import ModelOptions
from .. import groups
from ..bundle import Bundle
from ..libraries import mark_locked
from .augment import AUGMENT_DRAWS, augment, composite
from .model import GRID, Small
from .tokenizer import Tokenize, train_tokenizer

IMAGE_SIZE, CONTEXT_LENGTH, SCALE = 48, 12, 14.3
TOKENIZER = "tokenizer.json"
HALVES = [0.5, 0.5, 0.5]
PREPROCESSING = {"resize_mode": "longest", "interpolation": "bicubic", "fill_color": 255, "mean": HALVES, "std": HALVES}


class Prepare:
    """Pictures of any size and mode → (b, 3, size, size) float32 in [-1, 1]; see bundle.Prepare. They keep their shape:
    what is missing to a square is clear, and becomes background."""

    def __init__(self, size: int) -> None:
        self.size = (size, size)

    def __call__(self, images: Sequence[Image.Image], seeds: np.ndarray | None) -> Tensor:
        pictures = torch.from_numpy(np.stack([self._square(image) for image in images])).permute(0, 3, 1, 2)
        if seeds is None:
            return composite(pictures, None)
        draws = [np.random.Generator(np.random.Philox(seed)).random(AUGMENT_DRAWS) for seed in seeds.astype(np.uint64)]
        return augment(pictures, torch.from_numpy(np.stack(draws)))

    def _square(self, image: Image.Image) -> np.ndarray:
        image = image.convert("RGBA")
        if image.size != self.size:  # Pillow resizes RGBA premultiplied, so that hidden colors do not shine through
            image = ImageOps.pad(image, self.size, Image.Resampling.BICUBIC, color=(0, 0, 0, 0))
        return np.asarray(image)


def build(options: ModelOptions, captions: Callable[[], Iterable[str]], files: Mapping[str, bytes] | None) -> Bundle:
    """See towers.build."""
    if files is None:
        tokenizer = train_tokenizer(captions(), options.vocab_size)
    else:
        tokenizer = Tokenizer.from_str(files[TOKENIZER].decode())
    written = tokenizer.to_str().encode()  # before Tokenize sets a length
    size = options.image_size or IMAGE_SIZE
    length = options.context_length or CONTEXT_LENGTH
    module = Small(options, length, tokenizer.get_vocab_size(), options.initial_scale or SCALE)
    if options.lock != "none":
        getattr(module, options.lock).requires_grad_(False)
    mark_locked(module, module.image.parameters())
    module.image.checkpointing = module.text.checkpointing = options.gradient_checkpointing
    return Bundle(
        module,
        Prepare(size),
        Tokenize(tokenizer, length),
        width=options.embed_dim,
        tokens_per_pair=GRID * GRID + length,
        parameter_groups=partial(groups.without_layers, module, towers=options.towers),
        files={TOKENIZER: written},
        preprocessing=PREPROCESSING | {"size": [size, size]},
    )
