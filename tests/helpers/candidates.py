"""The candidate tile shapes that a computation on the Triton backend may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import pytest

from bench.gpu.compilation import FORCED, SM90, choices
from bench.gpu_tools.once import small_super_blocks

__all__ = ["every", "small_super_blocks"]


def every(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Sets SOFTCLIP_CANDIDATE to one value after the other, with which `run` takes, all in all, every candidate of
    every kind of kernel that it chooses from."""
    monkeypatch.setenv(FORCED, SM90)  # offered to small problems only where they are asked for
    found = choices(run)
    assert found
    for names in zip_longest(*found.values()):
        value = ",".join(f"{kind}={name or found[kind][0]}" for kind, name in zip(found, names, strict=True))
        monkeypatch.setenv(FORCED, value)
        yield value
