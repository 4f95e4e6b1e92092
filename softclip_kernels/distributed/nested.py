"""Tensors in nested containers, by the path of keys that leads to each: taken apart, and put together again.

Containers are tuples, named tuples, lists, mappings and dataclasses, hence also transformers' ModelOutput.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[Any, ...]  # of indices, keys and names of fields


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Whatever is no container, with its path, in order."""
    children = _children(tree)
    if children is None:
        yield path, tree
        return
    for key, child in children.items():
        yield from leaves(child, (*path, key))


def rebuilt(tree: Any, found: Mapping[Path, Any], path: Path = ()) -> Any:
    """`tree` with the leaves `found`. Containers keep their type, but for mappings, which become dicts."""
    children = _children(tree)
    if children is None:
        return found[path]
    new = {key: rebuilt(child, found, (*path, key)) for key, child in children.items()}
    if dataclasses.is_dataclass(tree):
        return dataclasses.replace(tree, **new)  # type: ignore[type-var]
    if isinstance(tree, Mapping):
        return new
    return getattr(type(tree), "_make", type(tree))(new.values())  # a named tuple has _make


def spelled(path: Path) -> str:
    return ".".join(map(str, path))


def _children(tree: Any) -> dict[Any, Any] | None:
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree) if field.init}
    if isinstance(tree, Mapping):
        return dict(tree)
    if isinstance(tree, (tuple, list)):
        return dict(enumerate(tree))
    return None
