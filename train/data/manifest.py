"""The manifest of a folder of prepared data. It is written last and atomically: where it is, a set-up was finished."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_atomically

MANIFEST_NAME = "manifest.json"
# Raised whenever what a set-up writes changes, captions and splits included: older folders are then made anew.
MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 8 << 20
# A shard is a plain file of the folder: no separator, no scheme such as "pipe:", no leading dot.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")


class DataError(ValueError):
    """Prepared data are missing, malformed or too corrupt; the message says what to do about it."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its plain name in the folder, its count of samples and the SHA-256 of its bytes in hex."""

    name: str
    samples: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    size         height and width of the pictures in pixels
    seed         what fixed splits and captions
    packages     the packages that it was made from: name and version
    group_names  the subject groups, which samples name
    shards       the tar files of each split
    counts       samples by split and vendor
    dropped      pictures that are in no split, counted by reason
    renderer     what drew them
    """

    size: int
    seed: int
    packages: dict[str, str]
    group_names: tuple[str, ...]
    shards: dict[str, tuple[Shard, ...]]
    counts: dict[str, dict[str, int]]
    dropped: dict[str, int]
    renderer: str
    format: int = MANIFEST_FORMAT


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `<folder>/manifest.json`; the last act of a set-up."""
    text = json.dumps(asdict(manifest), indent=1, sort_keys=True)
    write_atomically(folder / MANIFEST_NAME, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """Read and check `<folder>/manifest.json`. Raises DataError where there is none, or where it cannot be read, lacks
    a field or names a shard that is not a plain tar file of the folder."""
    path = folder / MANIFEST_NAME
    way_out = (
        "give a folder that `python -m train.data` made or that is laid out like it; the emoji set itself is made "
        "anew, where it was altered, by running that once more"
    )
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise DataError(f"{path} has {path.stat().st_size} bytes, at most {MAX_MANIFEST_BYTES} allowed; {way_out}")
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no {MANIFEST_NAME}, so its set-up did not finish; {way_out}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {way_out}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); {way_out}") from error
    try:
        if raw["format"] != MANIFEST_FORMAT:
            raise DataError(f"{path} has format {raw['format']!r}, this version reads {MANIFEST_FORMAT}; {way_out}")
        shards = {split: tuple(Shard(**entry) for entry in entries) for split, entries in raw["shards"].items()}
        manifest = Manifest(**{**raw, "shards": shards, "group_names": tuple(raw["group_names"])})
        checks = [(manifest.size, 1, "size")] + [(s.samples, 0, s.name) for group in shards.values() for s in group]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} lacks or misnames a field ({error!r}); {way_out}") from error
    for number, least, what in checks:
        if not isinstance(number, int) or number < least:
            raise DataError(f"{path} gives {number!r} for {what!r}, a whole number from {least} is allowed; {way_out}")
    for shard in (shard for group in shards.values() for shard in group):
        if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
            raise DataError(f"{path} names the shard {shard.name!r}; only plain '*.tar' names are allowed; {way_out}")
    return manifest
