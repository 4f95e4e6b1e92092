"""The default data set: real image-text pairs, emoji drawn by several vendors with their names and keywords.

`prepare_emoji` fetches and draws it once into a cache outside the repository:

    sources    the pinned npm packages: who drew what
    concepts   what is drawn: concepts, their families and captions
    drawings   who drew it: the vendors' SVG drawings, rendered
    splits     which pictures are trained on, and which are held out
    prepare    all of it in order, into ordinary WebDataset shards
    vendors    the pictures of seven more vendors, each a set of its own, drawn when it is asked for
"""

from ..drawn import SetupError
from .prepare import CLASSES, prepare_emoji
from .sources import SHIFT_VENDORS
from .splits import SPLITS
from .vendors import prepare_vendor

__all__ = ["CLASSES", "SHIFT_VENDORS", "SPLITS", "SetupError", "prepare_emoji", "prepare_vendor"]
