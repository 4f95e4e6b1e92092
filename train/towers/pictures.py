"""Pictures through the transforms of a library, with random numbers of their own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate  # stacks, in a worker process in memory that it shares

Transform = Callable[[Image.Image], Tensor]


class PerPicture:
    """bundle.Prepare by two transforms of one opaque RGB picture each → (3, H, W)."""

    def __init__(self, training: Transform, evaluation: Transform) -> None:
        self.training, self.evaluation = training, evaluation

    def __call__(self, images: Sequence[Image.Image], seeds: np.ndarray | None) -> Tensor:
        if seeds is None:
            return default_collate([self.evaluation(opaque(image)) for image in images])
        with _global_generators_kept():
            return default_collate([self._drawn(image, int(seed)) for image, seed in zip(images, seeds, strict=True)])

    def _drawn(self, image: Image.Image, seed: int) -> Tensor:
        """Libraries draw from the global generators. Each picture finds them seeded by its own seed, so that neither
        its place in a batch nor the process that prepares it plays a part."""
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        return self.training(opaque(image))


def opaque(image: Image.Image) -> Image.Image:
    """RGB; what is clear becomes white, where `convert` alone would show the color hidden under it."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
