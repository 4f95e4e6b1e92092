"""Packages in the form of those that emoji and icons are drawn from, made up and small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.data.emoji import sources

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
