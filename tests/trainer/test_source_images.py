"""Pictures of any format and mode, and what is none."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from helpers.layouts import picture
from PIL import Image, ImageFile

from train.data.images import decode
from train.data.record import BadRecordError

MAX_PIXELS = 1 << 20


def png_bomb(width: int) -> bytes:
    """A picture that claims to be `width` × `width`."""
    return picture()[:16] + width.to_bytes(4, "big") * 2 + picture()[24:]


def jpeg_bomb(width: int) -> bytes:
    data = picture("RGB", form="JPEG")
    sides = data.index(b"\xff\xc0") + 5  # in the frame header, after its length and the bits of a sample
    return data[:sides] + width.to_bytes(2, "big") * 2 + data[sides + 4 :]


def webp_bomb(kind: str) -> bytes:
    """16,000 × 16,000 pixels in each kind of WebP: lossy, lossless, and with a canvas."""
    buffer = io.BytesIO()
    first, second = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    more = {"save_all": True, "append_images": [second]} if kind == "canvas" else {}
    first.save(buffer, "WEBP", lossless=kind == "lossless", **more)
    data = bytearray(buffer.getvalue())
    if kind == "canvas":
        data[24:30] = (15_999).to_bytes(3, "little") * 2
    elif kind == "lossless":
        data[21:25] = (15_999 | 15_999 << 14).to_bytes(4, "little")
    else:
        data[26:30] = (16_000).to_bytes(2, "little") * 2
    return bytes(data)


def huge(form: str, sides: tuple[int, int] = (1025, 1024), **options: bool) -> bytes:
    """A sound picture of more than MAX_PIXELS."""
    buffer = io.BytesIO()
    Image.new("L", sides).save(buffer, form, **options)
    return buffer.getvalue()


HOSTILE = {
    "text": (b"not a picture", "not_an_image"),
    "nothing": (b"", "not_an_image"),
    "gif": (picture("L", form="GIF"), "not_an_image"),
    "postscript": (picture("RGB", form="EPS"), "not_an_image"),
    "pickle": (pickle.dumps({}), "not_an_image"),
    "other riff": (b"RIFF\0\0\0\0WAVEfmt " + b"\0" * 20, "not_an_image"),
    "cut png": (picture()[:60], "broken_image"),
    "cut to its mark": (picture()[:8], "broken_image"),
    "cut jpeg": (picture("RGB", form="JPEG")[:400], "broken_image"),
    "cut webp": (picture("RGB", form="WEBP", seed=0)[:100], "broken_image"),
    "png bomb": (png_bomb(60000), "image_too_large"),
    "jpeg bomb": (jpeg_bomb(60000), "image_too_large"),
    "jpeg that pillow takes for no bomb": (jpeg_bomb(2000), "image_too_large"),
    "lossy webp bomb": (webp_bomb("lossy"), "image_too_large"),
    "lossless webp bomb": (webp_bomb("lossless"), "image_too_large"),
    "webp bomb of a canvas": (webp_bomb("canvas"), "image_too_large"),
    "wide lossless webp": (huge("WEBP", (16_383, 65), lossless=True), "image_too_large"),
    **{f"large {form}": (huge(form), "image_too_large") for form in ("PNG", "JPEG", "WEBP")},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_picture_is_named(case: str) -> None:
    data, reason = HOSTILE[case]
    with pytest.raises(BadRecordError) as refusal:
        decode(data, MAX_PIXELS)
    assert refusal.value.args == (reason,)


@pytest.mark.parametrize("case", [case for case in HOSTILE if HOSTILE[case][1] == "image_too_large"])
def test_a_bomb_is_refused_before_any_decoding(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("a decoder saw the bomb"))
    if "jpeg" not in case.lower():  # judged by its header before Pillow sees it
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow saw the bomb"))
    with pytest.raises(BadRecordError, match="image_too_large"):
        decode(HOSTILE[case][0], MAX_PIXELS)


def test_as_many_pixels_as_allowed_are_read() -> None:
    assert decode(picture(), 256).size == (16, 16)
    with pytest.raises(BadRecordError, match="image_too_large"):
        decode(picture(), 255)


@pytest.mark.parametrize(
    ("mode", "form", "result"),
    (
        ("1", "PNG", "RGB"),
        ("L", "PNG", "RGB"),
        ("LA", "PNG", "RGBA"),
        ("P", "PNG", "RGB"),
        ("RGB", "PNG", "RGB"),
        ("RGBA", "PNG", "RGBA"),
        ("L", "JPEG", "RGB"),
        ("RGB", "JPEG", "RGB"),
        ("CMYK", "JPEG", "RGB"),
        ("RGB", "WEBP", "RGB"),
        ("RGBA", "WEBP", "RGBA"),
    ),
)
def test_every_mode_becomes_color(mode: str, form: str, result: str) -> None:
    image = decode(picture(mode, form=form), MAX_PIXELS)
    assert (image.mode, image.size) == (result, (16, 16))
    assert image.tobytes()  # in memory


def test_sixteen_bits_of_gray_keep_their_shade() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 100 * 257], [200 * 257, 65535]], np.uint16)).save(buffer, "PNG")
    image = decode(buffer.getvalue(), MAX_PIXELS)
    assert np.asarray(image)[..., 1].tolist() == [[0, 100], [200, 255]]


def test_a_transparent_color_stays_transparent() -> None:
    buffer = io.BytesIO()
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(buffer, "PNG", transparency=1)
    decoded = decode(buffer.getvalue(), MAX_PIXELS)
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0, 255), (0, 0, 255, 0)]


@pytest.mark.parametrize("form", ("JPEG", "PNG", "WEBP"))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(form: str, orientation: int) -> None:
    """As Pillow's own function turns them."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
    assert np.array_equal(np.asarray(decode(buffer.getvalue(), MAX_PIXELS)), np.asarray(expected))


def test_broken_exif_costs_no_picture() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=b"Exif\0\0XX*\0nonsense")
    assert decode(buffer.getvalue(), MAX_PIXELS).size == (8, 8)
