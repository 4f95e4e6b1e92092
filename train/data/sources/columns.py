"""Which columns of a table hold what."""

from __future__ import annotations

from collections.abc import Sequence

from ..record import DataError

IMAGE = ("image", "filepath", "file", "path", "image_path", "filename")
CAPTION = ("caption", "captions", "title", "text")
LABEL, CLASS = "label", "class"


def find_column(columns: Sequence[str], chosen: str | None, customary: Sequence[str], option: str, where: str) -> str:
    """The chosen column, or the first one with a customary name. Raises DataError where there is none."""
    wanted = customary if chosen is None else (chosen,)
    found = next((name for name in wanted if name in columns), None)
    if found is None:
        raise DataError(
            f"{where} has no column {' or '.join(map(repr, wanted))}; it has {', '.join(map(repr, columns))}: name one "
            f"by {option}"
        )
    return found
