"""SVG drawings as iconify's packages hold them, and their rendering to RGBA PNG."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Picture:
    """A drawing rendered: PNG bytes; `pixels` is the SHA-256 of their decoded RGBA, equal for identical pictures."""

    png: bytes
    pixels: str


def svg_of(icons: Mapping[str, Any], name: str, size: int, colour: str | None = None) -> str:
    """The SVG of one entry of an icons.json, `size` pixels high and wide. `colour`: what its `currentColor` becomes;
    by SVG's rules that is black."""
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    body = icon["body"] if colour is None else icon["body"].replace("currentColor", colour)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{size}" height="{size}">{body}</svg>'
    )


def rasterize(svg: str, size: int) -> Picture | None:
    """The drawing as `size` × `size` RGBA PNG; None where it is blank or cannot be read.

    One thread: about 0.7 ms a drawing, so that a pool of processes would cost more to start than it saves.
    """
    import resvg_py  # whoever reads other data needs none

    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
    except ValueError:
        return None
    image = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA")
    if image.size != (size, size) or image.getchannel("A").getextrema()[1] == 0:
        return None
    return Picture(png, hashlib.sha256(image.tobytes()).hexdigest())
