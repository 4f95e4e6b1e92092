"""What a caption may hold. Real text comes with characters that no tokenizer or log should meet:

- what UTF-8 cannot write (a lone surrogate, which JSON may spell), and bytes that are no UTF-8: the record is bad, as
  `broken_text`;
- NUL and other control characters, line breaks among them, and runs of white space: one space;
- invisible marks that only turn the direction of what is shown, and byte-order marks: taken out. (The joiners of
  emoji and of some scripts belong to the text and stay.);
- nothing but that: the record is bad, as `empty_caption`; more than MAX_CAPTION_CHARS: as `caption_too_long`.

The text of special tokens ("[PAD]") is text like any other; see tokenizer.encode.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from typing import Any

from .record import BadRecordError

MAX_CAPTION_CHARS = 10_000
MAX_CAPTIONS = 256
_DIRECTION_AND_ORDER_MARKS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
_TAKEN_OUT = str.maketrans("", "", _DIRECTION_AND_ORDER_MARKS)


def read_text(data: bytes) -> str:
    """The text of a file. Raises BadRecordError: broken_text, or caption_too_long without a look at it."""
    if len(data) > 4 * MAX_CAPTION_CHARS:
        raise BadRecordError("caption_too_long")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError("broken_text") from error


def read_fields(data: bytes) -> dict[str, Any]:
    """Those of a record's JSON. Raises BadRecordError: broken_json."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecordError("broken_json") from error
    if not isinstance(fields, dict):
        raise BadRecordError("broken_json")
    return fields


def captions_of(text: bytes | None, fields: dict[str, Any]) -> tuple[str, ...]:
    """The captions of a record in a shard: its text, then `captions` (a list) or `caption` of its JSON. Raises
    BadRecordError as `read_text` and `clean_all` do, and broken_json where these are something else."""
    found = fields.get("captions")
    if found is None:
        found = [] if fields.get("caption") is None else [fields["caption"]]
    if not isinstance(found, list) or len(found) > MAX_CAPTIONS or not all(isinstance(each, str) for each in found):
        raise BadRecordError("broken_json")
    return clean_all([*([] if text is None else [read_text(text)]), *found])


def clean_all(texts: Iterable[str]) -> tuple[str, ...]:
    """The captions of a record, each once, in this order. Raises BadRecordError as `clean` does, and no_caption where
    there is none."""
    captions = tuple(dict.fromkeys(map(clean, texts)))
    if not captions:
        raise BadRecordError("no_caption")
    return captions


def clean(text: str) -> str:
    """The caption as the rules above leave it. Raises BadRecordError: broken_text, empty_caption or
    caption_too_long."""
    if not is_writable(text):
        raise BadRecordError("broken_text")
    if len(text) > MAX_CAPTION_CHARS:
        raise BadRecordError("caption_too_long")
    spaced = "".join(" " if unicodedata.category(char) == "Cc" else char for char in text.translate(_TAKEN_OUT))
    cleaned = " ".join(spaced.split())
    if not cleaned:
        raise BadRecordError("empty_caption")
    return cleaned


def is_writable(text: str) -> bool:
    """Whether UTF-8 can write it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
