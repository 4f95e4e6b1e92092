"""Pictures from the bytes of their files: a few formats only, and the header is judged before any pixel is decoded."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from .record import BadRecordError

FORMATS = ("PNG", "JPEG", "WEBP")
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_ORIENTATION = 0x0112  # the tag of EXIF that says how the camera was held
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """PNG, JPEG or WebP → RGB, or RGBA where it may be transparent; upright, and in memory. Of a moving picture it is
    the first frame. Raises BadRecordError: not_an_image (another format), image_too_large or broken_image."""
    width, height = _size(data)
    if width * height > max_pixels:
        raise BadRecordError("image_too_large")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadRecordError("image_too_large")
        image.load()
        return _upright(_colored(image), _orientation(image))
    except Image.DecompressionBombError as error:
        raise BadRecordError("image_too_large") from error
    except BadRecordError:
        raise
    except Exception as error:
        # Pillow's decoders raise SyntaxError, OSError, ValueError, struct.error and more on broken bytes.
        raise BadRecordError("broken_image") from error


def _size(data: bytes) -> tuple[int, int]:
    """Width and height by the header, (0, 0) where Pillow finds them without making room for the pixels: in a JPEG, and
    in what is cut short."""
    if data.startswith(_PNG) and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        kind = data[12:16]
        if kind == b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        if kind == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if kind == b"VP8 ":
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
    elif data.startswith((_PNG, _JPEG)):
        return 0, 0
    raise BadRecordError("not_an_image")


def _colored(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of gray, which Pillow's own conversion would cut at 255
        high = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int | None:
    """The tag's value. Cameras and editors write EXIF in many broken ways, and the picture is as good without it."""
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:
        return None


def _upright(image: Image.Image, orientation: int | None) -> Image.Image:
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)
