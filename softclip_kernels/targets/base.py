"""What a target is: something that lowers itself to terms. A new target is one class with this one method.

A target describes a whole (global) batch of N rows (images) and M columns (texts) in both directions: image→text, a
distribution over columns for every row, and text→image, a distribution over rows for every column. Over ranks,
per-row and per-column tensors may be given for this rank's share or for the global batch; labels and teachers are this
rank's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from .context import Coefficients, Context
from .lowered import LoweredTarget


class Target(ABC):
    @abstractmethod
    def lower(self, context: Context) -> LoweredTarget:
        """This target as terms; raises on values that do not fit the batch. Communicates nothing: see Term.complete."""


def check_target(name: str, value: Any) -> None:
    if not isinstance(value, Target):
        hint = "; call its at(step, n)" if hasattr(value, "at") else ""
        raise TypeError(f"{name} must be a target, such as Hard() or Mix(...), not {type(value).__name__}{hint}")


def check_coefficients(name: str, value: Coefficients, check: Callable[[str, Any], None]) -> None:
    for part in value if isinstance(value, tuple) else (value,):
        check(name, part)
