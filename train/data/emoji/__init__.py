"""The default data set: real image-text pairs, emoji drawn by several vendors with their names and keywords.

`prepare_emoji` fetches and draws it once into a cache outside the repository:

    sources    the pinned npm packages, fetched and checked
    concepts   what is drawn: concepts, their families and captions
    drawings   who drew it: the vendors' SVG drawings, rendered
    splits     which pictures are trained on, and which are held out
    prepare    all of it in order, into ordinary WebDataset shards
    manifest   what a finished set-up says about itself
"""

from .prepare import CLASSES, prepare_emoji
from .sources import SetupError
from .splits import SPLITS

__all__ = ["CLASSES", "SPLITS", "SetupError", "prepare_emoji"]
