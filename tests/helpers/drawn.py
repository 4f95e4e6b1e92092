"""Packages in the form of those that emoji and icons are drawn from, made up and small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.data.emoji import sources
from train.data.icons.sources import ICON_SETS

COOKS = {"1F9D1-200D-1F373": "cook", "1F468-200D-1F373": "man cook", "1F469-200D-1F373": "woman cook"}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def fake_packages(folder: Path) -> Path:
    """46 concepts in the form of the real packages; the fruits 0 and 1 are one and the same picture by noto."""
    labels = {f"{0x1F400 + i:X}": f"fruit {i}" for i in range(42)} | COOKS | {"2764-FE0F": "red heart"}
    data: list[dict[str, Any]] = [
        {"hexcode": code, "label": label, "group": 4, "tags": ["food", "google", f"tag {i % 5}"]}
        for i, (code, label) in enumerate(labels.items())
    ]
    data[0]["skins"] = [{"hexcode": "1F400-1F3FB", "label": "fruit 0: light skin tone", "group": 4}]
    data += [{"hexcode": "1F3FB", "label": "light skin tone", "group": 2}, {"hexcode": "1F1E6", "label": "letter A"}]
    write_json(folder / "emojibase-data/en/data.json", data)
    write_json(folder / "emojibase-data/en/shortcodes/emojibase.json", {"1F400": ["fruit_zero", "zeroth"]})
    write_json(folder / "emojibase-data/meta/groups.json", {"groups": {"2": "component", "4": "food-drink"}})
    cldr = {"\u2764": {"default": ["love", "heart"], "tts": ["red heart"]}}
    write_json(folder / "cldr-annotations-full/annotations/en/annotations.json", {"annotations": {"annotations": cldr}})
    for v, (vendor, package) in enumerate(sources.VENDOR_PACKAGES.items()):
        icons, chars = {}, {}
        for i, (code, label) in enumerate(labels.items()):
            shade = 0 if vendor == "noto" and i < 2 else i
            name = label.replace(" ", "-")
            body = f'<circle cx="8" cy="8" r="{3 + v}" fill="#{shade * 5:02x}{v * 40:02x}80"/>'
            icons[name] = {"body": body}
            chars[code.lower().replace("-fe0f", "")] = name
        icons["fruit-0-light"] = {"body": "<g/>"}
        chars["1f400-1f3fb"] = "fruit-0-light"
        table: dict[str, Any] = {"icons": icons, "aliases": {}, "width": 16, "height": 16}
        if vendor == "emojione":  # knows no code points; one of its names is known only by an alias
            icons["old-heart"] = icons.pop("red-heart")
            table["aliases"] = {"red-heart": {"parent": "old-heart"}}
            chars = {}
        write_json(folder / package.name / "icons.json", table)
        write_json(folder / package.name / "chars.json", chars)
    return folder


def fake_vendor(folder: Path, vendor: str) -> Path:
    """Drawings without code points: a square each, but for the red heart, which is nearly noto's. The names are of four
    kinds: the label without hyphens, a numbered variant, Unicode's own (of 1F405), and one that nobody knows."""
    shades = {"fruit3": "#102030", "fruit-4-1": "#304050", "tiger": "#506070", "nothing-known": "#708090"}
    icons = {
        name: {"body": f'<rect x="3" y="3" width="9" height="9" fill="{shade}"/>'} for name, shade in shades.items()
    }
    icons["fruit-6"] = icons["fruit3"]
    icons["redheart"] = {"body": '<circle cx="8" cy="8" r="3" fill="#e10088"/>'}
    package = sources.SHIFT_VENDORS[vendor].name
    write_json(folder / package / "icons.json", {"icons": icons, "width": 16, "height": 16})
    write_json(folder / package / "chars.json", {})
    return folder


def fake_icons(folder: Path) -> Path:
    """Every icon set with the names `home`, `arrow down` and `tool 0` to `tool 39`, in two styles if it has any; mdi
    and hugeicons have more, and the makers of tabler and lucide give tags."""
    for name, icons in ICON_SETS.items():
        drawn = {}
        for number, what in enumerate(["home", "arrow-down", *(f"tool-{tool}" for tool in range(40))]):
            for style in (*icons.styles, "")[:2]:
                body = f'<rect x="2" y="{number % 12}" width="{3 + number % 9}" height="4" fill="currentColor"/>'
                drawn[f"{what}-{style}".removesuffix("-")] = {"body": body}
        table: dict[str, Any] = {"icons": drawn, "aliases": {}, "width": 16, "height": 16}
        if name == "mdi":
            drawn |= {key: drawn["home-outline"] for key in ("home", "traffic-light", "dice-1", "dice-2", "dice")}
            drawn["gone"] = {**drawn["home"], "hidden": True}
            table["aliases"] = {
                "house": {"parent": "home"},
                "house-outline": {"parent": "home-outline"},
                "arrow-up": {"parent": "arrow-down-outline", "vFlip": True},
                "nowhere": {"parent": "gone"},
            }
        if name == "hugeicons":
            drawn |= {key: drawn["home"] for key in ("cup", "cup-2", "cup-3", "car-01", "key2", "key")}
        write_json(folder / icons.package.name / "icons.json", table)
        if "metadata.json" in icons.package.files:
            categories = {"Home / House": [key for key in drawn if "home" in key], "Tools": list(drawn)}
            write_json(folder / icons.package.name / "metadata.json", {"categories": categories})
    tags = {"category": "Rooms", "tags": ["living", "Home", "roof", "door", "front-door"]}
    write_json(folder / "@tabler/icons/icons.json", {"home": tags})
    write_json(folder / "lucide-static/tags.json", {"home": ["living", "roof"]})
    return folder
