"""Who drew it: the vendors' SVG drawings joined to concepts, and their rendering to RGBA PNG."""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .concepts import Concept, normal_hexcode
from .sources import VENDOR_PACKAGES

UNSEEN_VENDOR = "fluent-emoji-flat"
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_SPELLED = {"&": "and", "*": "asterisk", "#": "hash", "\u2019": "", "'": ""}


@dataclass(frozen=True)
class Drawing:
    """One vendor's SVG of one concept."""

    concept: Concept
    vendor: str
    svg: str

    @property
    def key(self) -> str:
        """Sample id, unique in the whole set; without dots, as WebDataset keys must be."""
        return f"{self.concept.hexcode}_{self.vendor}"


@dataclass(frozen=True)
class Rendered:
    """A drawing as PNG bytes; `pixels` is the SHA-256 of its decoded RGBA, equal for identical pictures."""

    drawing: Drawing
    png: bytes
    pixels: str


def slug(label: str) -> str:
    """A label in the form of an icon name: 'flag: Åland Islands' -> 'flag-aland-islands'."""
    for char, spelled in _SPELLED.items():
        label = label.replace(char, spelled)
    ascii_label = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]+", "-", ascii_label).strip("-")


def _by_code(concepts: dict[str, Concept], chars: dict[str, str]) -> dict[str, str]:
    """Hexcode -> icon name, for a vendor whose chars.json maps code points."""
    coded = {normal_hexcode(code): name for code, name in chars.items()}
    return {code: coded[code] for code in concepts if code in coded}


def _readings(name: str) -> Iterator[str]:
    """The spellings under which an older icon name may be known today, the closest first."""
    yield name
    yield name.replace("flag-for-flag-", "flag-").replace("flag-for-", "flag-")
    yield name.replace("flag-for-", "")
    yield name.replace("-face", "")
    if name.startswith("digit-") and name[6:] in _DIGITS:
        yield f"keycap-{_DIGITS.index(name[6:])}"


def _by_name(known: dict[str, set[str]], icons: dict[str, Any]) -> dict[str, str]:
    """Hexcode -> icon name, for a vendor without code points (emojione): joined by name.

    An icon's own name is tried before its aliases, because aliases also cover other concepts that share the drawing
    (Bouvet Island shows the flag of Norway). Names that could mean two concepts are left out.
    """
    aliases: dict[str, list[str]] = defaultdict(list)
    for alias, entry in icons.get("aliases", {}).items():
        aliases[entry["parent"]].append(alias)

    def find(names: Iterable[str]) -> set[str]:
        codes: set[str] = set()
        for name in names:
            codes |= next((known[r] for r in _readings(name) if len(known.get(r, ())) == 1), set())
        return codes

    joined: dict[str, str] = {}
    for name in icons["icons"]:
        codes = find([name]) or find(aliases[name])
        if len(codes) == 1:
            joined.setdefault(next(iter(codes)), name)
    return joined


def _svg(icons: dict[str, Any], name: str, size: int) -> str:
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{size}" height="{size}">{icon["body"]}</svg>'
    )


def read_drawings(packages: Path, concepts: list[Concept], size: int) -> list[Drawing]:
    """Every vendor's drawing of every concept, joined on code points (by name for a vendor without them)."""
    by_code = {concept.hexcode: concept for concept in concepts}
    known: dict[str, set[str]] = defaultdict(set)
    for concept in concepts:
        known[slug(concept.label)].add(concept.hexcode)
    icons: dict[str, dict[str, Any]] = {}
    joined: dict[str, dict[str, str]] = {}
    for vendor, package in VENDOR_PACKAGES.items():
        icons[vendor] = json.loads((packages / package.name / "icons.json").read_text(encoding="utf-8"))
        chars = json.loads((packages / package.name / "chars.json").read_text(encoding="utf-8"))
        joined[vendor] = _by_code(by_code, chars)
        code_of = {name: code for code, name in joined[vendor].items()}
        for alias, entry in icons[vendor].get("aliases", {}).items():
            if entry["parent"] in code_of and set(entry) == {"parent"}:
                code_of[alias] = code_of[entry["parent"]]
        for name, code in code_of.items():
            known[name].add(code)
    drawings: list[Drawing] = []
    for vendor, codes in joined.items():
        names = codes or _by_name(known, icons[vendor])
        for code in by_code:
            # Aliases that mirror or turn another drawing are not in "icons" and are left out.
            if code in names and names[code] in icons[vendor]["icons"]:
                drawings.append(Drawing(by_code[code], vendor, _svg(icons[vendor], names[code], size)))
    return drawings


def render(drawings: list[Drawing], size: int) -> tuple[list[Rendered], int]:
    """Rasterize to `size` × `size` RGBA PNG; returns the pictures and the count of blank or unreadable drawings.

    One thread: about 0.7 ms a drawing, so that a pool of processes would cost more to start than it saves.
    """
    import resvg_py  # whoever reads other data needs none

    rendered: list[Rendered] = []
    failed = 0
    for drawing in drawings:
        try:
            png = bytes(resvg_py.svg_to_bytes(svg_string=drawing.svg, skip_system_fonts=True))
        except ValueError:
            failed += 1
            continue
        image = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA")
        if image.size != (size, size) or image.getchannel("A").getextrema()[1] == 0:
            failed += 1
            continue
        rendered.append(Rendered(drawing, png, hashlib.sha256(image.tobytes()).hexdigest()))
    return rendered, failed
