"""From a split to batches: which samples, and how their pictures reach the model."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_DEGREES = 12.0
SCALE_RANGE = (0.85, 1.15)
MAX_SHIFT = 0.1  # of the picture's width
WHITE_SHARE = 0.5  # of the augmented pictures; the others get a random colour


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


@lru_cache(maxsize=4)
def _epoch_order(n: int, batch: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch for n >= 2 * batch, such that the batch across its start repeats no sample.

    That batch takes the last samples of the epoch before and the first of this one. First samples that are among
    those last ones change places with samples from the middle, never from this epoch's own end, on which the next
    epoch relies; so an order follows from two permutations and needs no walk through the epochs before.
    """
    order = _permutation(n, seed, epoch)
    head = -epoch * n % batch  # samples of this epoch in the batch across its start
    if head:
        before = _permutation(n, seed, epoch - 1)[n - (batch - head) :]
        middle_end = n - (epoch + 1) * n % batch
        clashes = np.flatnonzero(np.isin(order[:head], before))
        free = head + np.flatnonzero(~np.isin(order[head:middle_end], before))[: len(clashes)]
        order[clashes], order[free] = order[free], order[clashes]
    order.flags.writeable = False  # it is shared through the cache
    return order


def batch_indices(n: int, batch: int, step: int, seed: int) -> np.ndarray:
    """(batch,) int64, batch <= n: which of n things the global batch of a step takes, a pure function of the arguments.

    Epoch permutations follow one another without a gap, and a batch may lie across two; no batch takes a thing twice.
    For n < 2 * batch each step takes the first ``batch`` of a permutation of its own, since two batches in a row must
    then share some.
    """
    if not 1 <= batch <= n or step < 0 or seed < 0:
        raise ValueError(f"batch={batch} must lie in [1, n={n}], and step={step} and seed={seed} must be at least 0")
    if n < 2 * batch:
        return _permutation(n, seed, step)[:batch]
    epoch, offset = divmod(step * batch, n)
    first = _epoch_order(n, batch, seed, epoch)[offset : offset + batch]
    if len(first) == batch:
        return first.copy()
    return np.concatenate([first, _epoch_order(n, batch, seed, epoch + 1)[: batch - len(first)]])


def _premultiplied(images: Tensor) -> tuple[Tensor, Tensor]:
    """(b, 4, H, W) uint8 RGBA -> colours times alpha (b, 3, H, W) and alpha (b, 1, H, W), float32 in 0..1."""
    if images.ndim != 4 or images.shape[1] != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; uint8 of (b, 4, H, W) is allowed")
    scaled = images.float() / 255.0
    alpha = scaled[:, 3:]
    return scaled[:, :3] * alpha, alpha


def _over(colour: Tensor, alpha: Tensor, background: Tensor) -> Tensor:
    """Premultiplied pictures over (b, 3) background colours, scaled to [-1, 1]."""
    return (colour + (1.0 - alpha) * background[:, :, None, None]) * 2.0 - 1.0


def composite(images_uint8_rgba: Tensor, background: Tensor | None) -> Tensor:
    """Lay pictures on a plain background.

    Args:
        images_uint8_rgba: (b, 4, H, W) uint8, not premultiplied.
        background: (b, 3) float colours in 0..1, or None for white.

    Returns:
        (b, 3, H, W) float32 in [-1, 1].
    """
    colour, alpha = _premultiplied(images_uint8_rgba)
    count = len(images_uint8_rgba)
    if background is None:
        background = colour.new_ones(count, 3)
    elif background.shape != (count, 3):
        raise ValueError(f"background has shape {tuple(background.shape)}; ({count}, 3) or None is allowed")
    return _over(colour, alpha, background.to(colour))


def augment(images_rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift each picture a little and lay it on white or on a random colour.

    Never mirrored: arrows, letters and hands would change their meaning.

    Args:
        images_rgba: (b, 4, H, W) uint8, not premultiplied, on any device.
        generator: source of all the randomness, on any device.

    Returns:
        (b, 3, H, W) float32 in [-1, 1], on the device of the images.
    """
    colour, alpha = _premultiplied(images_rgba)
    count = len(images_rgba)
    draws = torch.rand(count, 8, generator=generator, device=generator.device).to(colour)
    angle = (draws[:, 0] * 2.0 - 1.0) * math.radians(MAX_DEGREES)
    zoom = 1.0 / (SCALE_RANGE[0] + draws[:, 1] * (SCALE_RANGE[1] - SCALE_RANGE[0]))
    shift = (draws[:, 2:4] * 2.0 - 1.0) * (2.0 * MAX_SHIFT)  # affine_grid measures from -1 to 1
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    # Premultiplied, so that interpolation does not pull in the hidden colour of transparent pixels.
    layers = torch.cat([colour, alpha], 1)
    grid = F.affine_grid(theta, list(layers.shape), align_corners=False)
    moved = F.grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    background = torch.where(draws[:, 4:5] < WHITE_SHARE, torch.ones_like(draws[:, 5:]), draws[:, 5:])
    return _over(moved[:, :3], moved[:, 3:], background)
