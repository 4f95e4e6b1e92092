"""How pictures reach the model: laid on a background, and in training turned, scaled and shifted a little."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENT_DRAWS = 8  # uniform numbers a picture takes, in order: angle, zoom, shift (2), whether white, color (3)
MAX_DEGREES = 12.0
SCALE_RANGE = (0.85, 1.15)
MAX_SHIFT = 0.1  # of the picture's width
WHITE_SHARE = 0.5  # of the augmented pictures; the others get a random color


def composite(images: Tensor, background: Tensor | None) -> Tensor:
    """Lay pictures on a plain background.

    images      (b, 4, H, W) uint8 RGBA, not premultiplied
    background  (b, 3) float colors in 0..1, or None for white

    Returns (b, 3, H, W) float32 in [-1, 1].
    """
    color, alpha = _premultiplied(images)
    count = len(images)
    if background is None:
        background = color.new_ones(count, 3)
    elif background.shape != (count, 3):
        raise ValueError(f"background has shape {tuple(background.shape)}; ({count}, 3) or None is allowed")
    return _over(color, alpha, background.to(color))


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Turn, scale and shift each picture a little and lay it on white or on a random color.

    images  (b, 4, H, W) uint8 RGBA, not premultiplied
    draws   (b, AUGMENT_DRAWS) uniform numbers in [0, 1), all the randomness there is

    Returns (b, 3, H, W) float32 in [-1, 1]. Pictures are never mirrored: arrows, letters and hands would change their
    meaning.
    """
    color, alpha = _premultiplied(images)
    draws = draws.to(color)
    angle = (draws[:, 0] * 2.0 - 1.0) * math.radians(MAX_DEGREES)
    zoom = 1.0 / (SCALE_RANGE[0] + draws[:, 1] * (SCALE_RANGE[1] - SCALE_RANGE[0]))
    shift = (draws[:, 2:4] * 2.0 - 1.0) * (2.0 * MAX_SHIFT)  # affine_grid measures from -1 to 1
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    # Premultiplied, so that interpolation does not pull in the hidden color of transparent pixels.
    layers = torch.cat([color, alpha], 1)
    grid = F.affine_grid(theta, list(layers.shape), align_corners=False)
    moved = F.grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    background = torch.where(draws[:, 4:5] < WHITE_SHARE, torch.ones_like(draws[:, 5:]), draws[:, 5:])
    return _over(moved[:, :3], moved[:, 3:], background)


def _premultiplied(images: Tensor) -> tuple[Tensor, Tensor]:
    """(b, 4, H, W) uint8 RGBA → colors times alpha (b, 3, H, W) and alpha (b, 1, H, W), float32 in 0..1."""
    if images.ndim != 4 or images.shape[1] != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; uint8 of (b, 4, H, W) is allowed")
    scaled = images.float() / 255.0
    alpha = scaled[:, 3:]
    return scaled[:, :3] * alpha, alpha


def _over(color: Tensor, alpha: Tensor, background: Tensor) -> Tensor:
    """Premultiplied pictures over (b, 3) background colors, scaled to [-1, 1]."""
    return (color + (1.0 - alpha) * background[:, :, None, None]) * 2.0 - 1.0
