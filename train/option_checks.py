"""What an option may be, checked in one line each; and the error where it is something else."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run."""


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}; allowed: {', '.join(map(repr, allowed))}")


def at_least(name: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise ConfigError(f"{name}={value}; allowed: {lowest} or more")


def within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also catches NaN
        raise ConfigError(f"{name}={value}; allowed: {low} to {high}")
