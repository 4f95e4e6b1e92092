"""Icon sets: drawings of things and signs, in one color, with names, other names, tags and categories.

`prepare_icons` fetches and draws one set once into a cache outside the repository:

    sources  the pinned npm packages: who drew what
    words    names without style and number, captions, categories
    prepare  all of it in order, into ordinary WebDataset shards
"""

from .prepare import CLASSES, TRAINING, prepare_icons, prepare_names, splits_of
from .sources import ICON_SETS
from .words import label_of

__all__ = ["CLASSES", "ICON_SETS", "TRAINING", "label_of", "prepare_icons", "prepare_names", "splits_of"]
