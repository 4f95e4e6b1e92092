"""What a finished set-up says about itself. It is written last and atomically: where it is, all else is too."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ...files import write_atomically

MANIFEST = "set-up.json"


@dataclass(frozen=True)
class Manifest:
    """Of one set-up.

    size      height and width of the pictures in pixels
    seed      what fixed splits and captions
    packages  the packages that it was made from: name and version
    files     the SHA-256 of each file's bytes in hex
    counts    samples by split and vendor or set
    dropped   pictures that are in no split, counted by reason
    renderer  what drew them
    """

    size: int
    seed: int
    packages: dict[str, str]
    files: dict[str, str]
    counts: dict[str, dict[str, int]]
    dropped: dict[str, int]
    renderer: str


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none, or none that can be read."""
    try:
        raw = json.loads((folder / MANIFEST).read_bytes())
        return Manifest(**{field.name: raw[field.name] for field in fields(Manifest)})
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
