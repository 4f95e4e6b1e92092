"""Launches without a GPU's driver, noted, for the whole of a process (bench/stubbed.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from bench import stubbed

noted: list[stubbed.Launch] = []  # every launch: the kernel, its grid, its arguments
compiled: list[str] = []  # the kernel of every variant
_for_good = contextlib.ExitStack()


def install(check: Callable[[Any, dict[str, str]], None] = lambda kernel, signature: None) -> None:
    """check: called with every kernel that is compiled and the types of its arguments."""

    def note(kernel: Any, signature: dict[str, str]) -> None:
        compiled.append(kernel.__name__)
        check(kernel, signature)

    _for_good.enter_context(stubbed.gpu(noted.append, note))
