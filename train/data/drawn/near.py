"""Pictures that are nearly equal: one drawing in other colors, of another size, or with small changes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SIDE = 16
# Chosen by looking at pairs, in order of their difference: below it one sees the same drawing twice, with few
# exceptions; above it, two artists' drawings of a plain thing.
NEAR = 0.06


def grey(png: bytes) -> np.ndarray:
    """(SIDE, SIDE) float32 of 0 to 1: the picture on white, cut to what is drawn, in grey and small."""
    image = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L")
    return np.asarray(flat.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two grey pictures differ by less than NEAR, as the root of the mean square."""
    return float(np.square(one - other).mean()) < NEAR**2
