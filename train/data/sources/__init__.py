"""Where image-text pairs come from: one Source for every layout.

scan, shard_index, tar   shards, as img2dataset and WebDataset write them
folder, table, arrow     folders of pictures, CSV and TSV files, data sets of Hugging Face's library
several                  one source after another
drawn                    the emoji set and icon sets, fetched and drawn on demand
index                    arrays that are made once and kept in files, for all processes of a machine
reading, columns         what they have in common
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from braceexpand import braceexpand

from ...options import DataOptions
from ..record import DataError, Source
from .arrow import ArrowSource
from .drawn import open_drawn, read_spec
from .folder import FolderSource
from .several import Concatenated
from .table import TableSource
from .tar import TarSource

FORMS = """\
DIR                            that holds *.tar files: shards, such as img2dataset's output folder
DIR                            that holds pictures: each with a .txt of its name, or in a folder named as its class
x.tar, dir/{00000..00999}.tar  these shards
x.csv, x.tsv                   a table with a column of paths and one of captions
hf:DIR                         one split of a data set that Hugging Face's datasets library saved to disk
emoji:SPLIT[@SIZE]             a split of the emoji set (train, heldout, vendor, concepts), of SIZE pixels (48)
emoji:VENDOR[@SIZE]            the emoji of another vendor; the command `data` lists them
icons:SET[@SIZE]               an icon set, or those to train on (train, heldout), of SIZE pixels (48)
icons:SET/names[@SIZE]         those of its pictures whose name several sets share, with the name as their class
A::B                           all of A, then all of B
stream:URLS                    shards that are read from end to end, for training only"""
ALLOWED = f"allowed:\n{FORMS}"
MAX_SHARDS = 1_000_000


def open_source(spec: str, options: DataOptions) -> Source:
    """The source that `spec` names in one of FORMS, but for streams, which cannot be read at random. Raises DataError
    where there is no such thing, or it cannot be read; ConfigError where a library is missing."""
    parts = spec.split("::")
    if len(parts) > 1:
        return Concatenated([open_source(part, options) for part in parts])
    kind, colon, rest = spec.partition(":")
    if colon and kind == "stream":
        raise DataError(f"{spec!r} can only be trained on, and not with other sources; {ALLOWED}")
    if colon and kind == "hf":
        return ArrowSource(Path(rest).expanduser(), options)
    drawn = read_spec(spec)
    if drawn is not None:
        return open_drawn(drawn, options)
    path = Path(spec).expanduser()
    if spec and path.is_dir():  # "" is the working folder to Path
        shards = sorted(path.glob("*.tar"))
        return TarSource(shards, options, "*.tar") if shards else FolderSource(path, options)
    if path.suffix == ".tar":
        return TarSource(_expand(path), options, path.name)
    if path.exists() and path.suffix.lower() in (".csv", ".tsv"):
        return TableSource(path, options)
    raise DataError(f"{spec!r} {'is no form of data' if path.exists() else 'is not there'}; {ALLOWED}")


def _expand(path: Path) -> list[Path]:
    """The shards that a path with braces names, as bash would expand them."""
    if path.exists():
        return [path]
    # The library makes every number of a range before it returns the first name.
    spans = [abs(int(last) - int(first)) + 1 for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", str(path))]
    if math.prod(spans) > MAX_SHARDS:
        raise DataError(f"{path} names more than {MAX_SHARDS} shards; {ALLOWED}")
    try:
        return [Path(name) for name in braceexpand(str(path))]
    except ValueError as error:
        raise DataError(f"{path}: its braces cannot be expanded ({error}); {ALLOWED}") from error
