"""Other people's libraries, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable

from .torchvision_beside_cpu import describe_torchvision


def missing(module: str) -> str | None:
    """Why what needs this module cannot run; None where it can."""
    return None if importlib.util.find_spec(module) is not None else f"{module} is not installed"


def import_all(modules: Iterable[str]) -> None:
    """All that are there, for processes forked from this one. What fails here fails again where it is used, and is
    told of there."""
    describe_torchvision()
    for module in dict.fromkeys(modules):
        try:
            importlib.import_module(module)
        except Exception:
            continue
