"""What an icon shows, in words: its name without style and number, other names, tags, and a category."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..drawn import keyword_captions, read_json
from .sources import IconSet

LABEL_BITS = 62  # sources.reading.MAX_LABEL


@dataclass(frozen=True)
class Icon:
    """One drawing of an icon set.

    key       its name in the package, style and number included
    name      what it shows, with spaces; drawings of one name, of any set, are the same thing
    captions  the first one is the name
    category  by the set's makers; None where they give none
    """

    key: str
    name: str
    captions: tuple[str, ...]
    category: str | None


def label_of(name: str) -> int:
    """The label of what has that name: the name alone fixes it, so that sets that are read apart agree."""
    return stable_number(name) >> (64 - LABEL_BITS)


def stable_number(text: str) -> int:
    """0 to 2^64 - 1, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def without_style(styles: tuple[str, ...], keys: Iterable[str]) -> Callable[[str], str]:
    """A function that takes the style off a key. It does so where the set draws the same in another style too: of
    `traffic-light` in a set that has a light style, but no other `traffic`, it leaves the light."""
    known = set(keys)

    def strip(key: str) -> str:
        for style in styles:
            base = key.removesuffix(f"-{style}")
            if base != key and (base in known or any(f"{base}-{s}" in known for s in styles if s != style)):
                return base
        return key

    return strip


def without_number(bases: Iterable[str]) -> Callable[[str], str]:
    """A function that takes off a number that counts variants: one with leading zeros (`home-01`), or one of the row
    `home`, `home-2`, `home-3`, which has no 0 or 1 (as `dice-1`, `dice-2` has)."""
    known = set(bases)

    def strip(base: str) -> str:
        found = re.fullmatch(r"(.*[a-z])(-?)(\d+)", base)
        if found is None:
            return base
        stem, first, number = found[1], found[1] + found[2], found[3]
        if re.fullmatch(r"0\d", number):
            return stem
        row = stem in known and f"{first}2" in known and not {f"{first}0", f"{first}1"} & known
        return stem if row and len(number) == 1 else base

    return strip


def _categories(packages: Path, icons: IconSet) -> dict[str, str]:
    """Key -> the first category that names it."""
    if "metadata.json" not in icons.package.files:
        return {}
    table = read_json(packages, icons.package, "metadata.json")["categories"]
    found: dict[str, str] = {}
    for category, keys in table.items():
        for key in keys:
            found.setdefault(key, category)
    return found


def _more_words(packages: Path, icons: IconSet) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Tags and categories by key, of the makers' own package: a list of tags, or a table with both."""
    if icons.tags is None:
        return {}, {}
    (file,) = icons.tags.files
    table: dict[str, Any] = read_json(packages, icons.tags, file)
    tags = {key: entry if isinstance(entry, list) else entry["tags"] for key, entry in table.items()}
    categories = {key: entry["category"] for key, entry in table.items() if isinstance(entry, dict)}
    return tags, {key: category for key, category in categories.items() if category}


def _captions(
    name: str, others: Iterable[str], category: str | None, tags: Iterable[str], seed: int
) -> tuple[str, ...]:
    known = {name, *others}
    words = [word for word in dict.fromkeys(str(tag).lower().replace("-", " ") for tag in tags) if word not in known]
    captions = [name, f"an icon of {name}", f"{name} icon", *others]
    if category is not None:
        captions.append(f"{category_words(category)}: {name}")
    return tuple(dict.fromkeys([*captions, *keyword_captions(name, words, seed)]))


def category_words(category: str) -> str:
    """A category as it reads in a sentence: 'Account / User' -> 'account and user'."""
    return re.sub(r"\s*[/&]\s*", " and ", category).lower()


def read_icons(packages: Path, icons: IconSet, seed: int) -> list[Icon]:
    """All drawings of a set in the package's order, but for those that its makers have withdrawn; `seed` fixes the
    order of tags in captions."""
    table = read_json(packages, icons.package, "icons.json")
    keys = [key for key, entry in table["icons"].items() if not entry.get("hidden")]
    plain = without_style(icons.styles, [*keys, *table.get("aliases", {})])
    bases = {key: plain(key) for key in keys}
    unnumbered = without_number(bases.values())
    names = {key: unnumbered(base).replace("-", " ") for key, base in bases.items()}
    others: dict[str, list[str]] = defaultdict(list)  # by name, so that all styles share them
    for alias, entry in table.get("aliases", {}).items():
        # An alias of an alias is rare, and one that mirrors or turns its parent shows another thing.
        if set(entry) == {"parent"} and entry["parent"] in names:
            other = unnumbered(plain(alias)).replace("-", " ")
            if other != names[entry["parent"]]:
                others[names[entry["parent"]]].append(other)
    tags, more = _more_words(packages, icons)
    categories = {**more, **_categories(packages, icons)}
    read = []
    for key, name in names.items():
        category = categories.get(key, categories.get(bases[key]))
        captions = _captions(name, others[name], category, tags.get(key, tags.get(bases[key], ())), seed)
        read.append(Icon(key, name, captions, category))
    return read
