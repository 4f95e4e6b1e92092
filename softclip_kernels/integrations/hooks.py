"""What an adapter relies on of its host, read before it is relied on: a hook that is not the known one is an error."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_MARKS: dict[Any, str] = {
    inspect.Parameter.KEYWORD_ONLY: "*",
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


class UnknownHost(RuntimeError):
    """The installed host is not one that the adapter knows: hooking into it might silently do nothing."""


@dataclass(frozen=True)
class Hook:
    """A function or a class of the host, and the names of its parameters.

    host        the distribution and its versions that were read and run, such as "open_clip_torch 3.3"
    where       "module:name", the name with dots for a method
    parameters  in order, without self; those after a bare * as "*name", **keywords as "**name"
    """

    host: str
    where: str
    parameters: tuple[str, ...]

    def find(self) -> Any:
        """What the hook names, as the installed host has it. Raises UnknownHost if it has another signature or is not
        there; ImportError if the host is not installed."""
        module, _, path = self.where.partition(":")
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            if not hasattr(found, name):
                raise UnknownHost(f"{self.where} is not there; {self._known()}")
            found = getattr(found, name)
        if (seen := parameters(found)) != self.parameters:
            raise UnknownHost(f"{self.where} takes ({', '.join(seen)}); {self._known()}")
        return found

    def _known(self) -> str:
        return (
            f"this adapter knows {self.host}, where it takes ({', '.join(self.parameters)}). Install that, or call "
            f"softclip_loss in a loop of your own"
        )


def check(hooks: Iterable[Hook]) -> None:
    """Raises UnknownHost where one of them is not as it is known: before anything is hooked into."""
    for hook in hooks:
        hook.find()


def parameters(function: Any) -> tuple[str, ...]:
    """The names of what a function takes, as Hook has them."""
    named = inspect.signature(function).parameters.values()
    return tuple(_MARKS.get(one.kind, "") + one.name for one in named if one.name != "self")
