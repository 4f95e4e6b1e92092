"""Who drew it: the vendors' SVG drawings joined to concepts, and rendered."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..drawn import Package, Picture, rasterize, read_json, svg_of
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
class Rendered(Picture):
    """The picture of a drawing."""

    drawing: Drawing


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


def _free_readings(name: str) -> Iterator[str]:
    """Those of sets that were not named by Unicode's own words: numbered variants, bare countries."""
    yield from _readings(name)
    plain = re.sub(r"-\d$", "", name)
    yield plain
    yield f"flag-{plain}"


def _by_name(
    known: dict[str, set[str]], icons: dict[str, Any], readings: Callable[[str], Iterable[str]]
) -> dict[str, str]:
    """Hexcode -> icon name, for a vendor without code points: joined by name.

    An icon's own name is tried before its aliases, because aliases also cover other concepts that share the drawing
    (Bouvet Island shows the flag of Norway). Names that could mean two concepts are left out.
    """
    aliases: dict[str, list[str]] = defaultdict(list)
    for alias, entry in icons.get("aliases", {}).items():
        aliases[entry["parent"]].append(alias)

    def find(names: Iterable[str]) -> set[str]:
        codes: set[str] = set()
        for name in names:
            codes |= next((known[r] for r in readings(name) if len(known.get(r, ())) == 1), set())
        return codes

    joined: dict[str, str] = {}
    for name in icons["icons"]:
        codes = find([name]) or find(aliases[name])
        if len(codes) == 1:
            joined.setdefault(next(iter(codes)), name)
    return joined


@dataclass(frozen=True)
class _Vendors:
    """The first five, read: icons.json of each, its icon names by hexcode, and every name that is known of a concept,
    with the hexcodes it may mean."""

    icons: dict[str, dict[str, Any]]
    joined: dict[str, dict[str, str]]
    known: dict[str, set[str]]


def _read_vendors(packages: Path, by_code: dict[str, Concept]) -> _Vendors:
    known: dict[str, set[str]] = defaultdict(set)
    for concept in by_code.values():
        known[slug(concept.label)].add(concept.hexcode)
    icons: dict[str, dict[str, Any]] = {}
    joined: dict[str, dict[str, str]] = {}
    for vendor, package in VENDOR_PACKAGES.items():
        icons[vendor] = read_json(packages, package, "icons.json")
        joined[vendor] = _by_code(by_code, read_json(packages, package, "chars.json"))
        code_of = {name: code for code, name in joined[vendor].items()}
        for alias, entry in icons[vendor].get("aliases", {}).items():
            if entry["parent"] in code_of and set(entry) == {"parent"}:
                code_of[alias] = code_of[entry["parent"]]
        for name, code in code_of.items():
            known[name].add(code)
    return _Vendors(icons, joined, known)


def _drawn(
    vendor: str, icons: dict[str, Any], names: dict[str, str], concepts: list[Concept], size: int
) -> list[Drawing]:
    # Aliases that mirror or turn another drawing are not in "icons" and are left out.
    there = [concept for concept in concepts if names.get(concept.hexcode) in icons["icons"]]
    return [Drawing(concept, vendor, svg_of(icons, names[concept.hexcode], size)) for concept in there]


def read_drawings(packages: Path, concepts: list[Concept], size: int) -> list[Drawing]:
    """The first five vendors' drawings of every concept, joined on code points (by name where there are none)."""
    vendors = _read_vendors(packages, {concept.hexcode: concept for concept in concepts})
    drawings: list[Drawing] = []
    for vendor, icons in vendors.icons.items():
        names = vendors.joined[vendor] or _by_name(vendors.known, icons, _readings)
        drawings += _drawn(vendor, icons, names, concepts, size)
    return drawings


def read_more_drawings(
    packages: Path, vendor: str, package: Package, own: Path, concepts: list[Concept], size: int
) -> list[Drawing]:
    """Another vendor's drawings, of whose package the files are in `own`. Without code points it is joined by the names
    that the first five and Unicode have."""
    by_code = {concept.hexcode: concept for concept in concepts}
    icons = read_json(own, package, "icons.json")
    names = _by_code(by_code, read_json(own, package, "chars.json"))
    if not names:
        known = _read_vendors(packages, by_code).known
        for name, codes in [(name, codes) for name, codes in known.items() if "-" in name]:
            known[name.replace("-", "")] |= codes
        for code in by_code:
            if "-" not in code:
                known[slug(unicodedata.name(chr(int(code, 16)), "")).replace("-", "")].add(code)
        names = _by_name(known, icons, _free_readings)
    return _drawn(vendor, icons, names, concepts, size)


def render(drawings: list[Drawing], size: int) -> tuple[list[Rendered], int]:
    """Pictures of `size` × `size` pixels, and the count of blank or unreadable drawings."""
    pictures = [(drawing, rasterize(drawing.svg, size)) for drawing in drawings]
    rendered = [Rendered(picture.png, picture.pixels, drawing) for drawing, picture in pictures if picture is not None]
    return rendered, len(pictures) - len(rendered)
