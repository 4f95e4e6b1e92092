"""Small real data from packages: scikit-learn's handwritten digits with captions; summaries of Python's functions."""

from __future__ import annotations

import csv
import functools
import inspect
from pathlib import Path

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK = ("pale", "thin", "plain", "bold", "heavy")


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target


def images(count: int, size: int = 32) -> np.ndarray:
    """(count, size, size, 3) uint8: black on white, every pixel of the 8 x 8 a square."""
    pixels = 255 - (_digits()[0][:count] / 16 * 255).astype(np.uint8)
    large = pixels.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
    return np.stack([large] * 3, axis=-1)


def classes(count: int) -> list[int]:
    return [int(one) for one in _digits()[1][:count]]


def captions(count: int) -> list[str]:
    """What is to be seen: the digit, how much ink, and where it lies. Some are alike, as captions are."""
    pictures, digits = _digits()
    told = []
    for picture, digit in zip(pictures[:count], digits[:count], strict=True):
        ink = INK[min(int((picture.mean() - 3.5) / 0.6), 4) if picture.mean() > 3.5 else 0]
        side = "left" if picture[:, :4].sum() > picture[:, 4:].sum() else "right"
        told.append(f"a {ink} handwritten {WORDS[digit]} leaning {side}")
    return told


def write_csv(folder: Path, count: int) -> Path:
    """Pictures as PNG, and a table of filepath and caption with tabs between."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "pairs.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(("filepath", "title"))
        for k, (picture, caption) in enumerate(zip(images(count), captions(count), strict=True)):
            Image.fromarray(picture).save(folder / f"{k:04}.png")
            rows.writerow((folder / f"{k:04}.png", caption))
    return table


def sentence_pairs(count: int) -> list[tuple[str, str]]:
    """(a function of numpy as a question, the first sentence of its documentation), all different."""
    found: dict[str, str] = {}
    for place in (np, np.linalg, np.fft, np.random, np.ma, np.strings, np.polynomial.polynomial):
        # Not dir(place), for packages put names of their own there, and no two processes import the same.
        for name in sorted(place.__all__):
            text = inspect.getdoc(getattr(place, name))
            summary = (text or "").partition("\n\n")[0].replace("\n", " ").strip()
            if not name.startswith("_") and 20 < len(summary) < 120 and "(" not in summary:
                found.setdefault(summary, f"what does {name.replace('_', ' ')} do")
    pairs = [(question, summary) for summary, question in found.items()]
    if len(pairs) < count:
        raise ValueError(f"{count} sentence pairs asked for, numpy's documentation has {len(pairs)}")
    return pairs[:count]
