"""The candidate tile shapes that a computation on the Triton backend may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import pytest

VARIABLE = "SOFTCLIP_CANDIDATE"


def every(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Sets the variable to one value after the other, with which `run` takes, all in all, every candidate of every kind
    of kernel that it chooses from."""
    from softclip_kernels.backends.triton import tuning

    found: dict[str, tuple[str, ...]] = {}
    choose = tuning.choose

    def noted(kind: str, key: str, shapes: Any, *arguments: Any) -> Any:
        found[kind] = tuple(shape.name for shape in shapes)
        return choose(kind, key, shapes, *arguments)

    monkeypatch.delenv(VARIABLE, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "choose", noted)
        run()
    assert found
    for names in zip_longest(*found.values()):
        value = ",".join(f"{kind}={name or found[kind][0]}" for kind, name in zip(found, names, strict=True))
        monkeypatch.setenv(VARIABLE, value)
        yield value
