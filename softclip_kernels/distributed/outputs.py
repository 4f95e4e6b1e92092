"""What a model returns for every micro-batch: checked, and joined to what it would return for the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import nested
from .nested import Path


def checked(returned: Any) -> dict[Path, Any]:
    """The leaves of what a model returned. TypeError and ValueError where TwoPass does not take one."""
    found = dict(nested.leaves(returned))
    if () in found:
        raise TypeError(
            f"the model must return a tuple of tensors, not {type(returned).__name__}; allowed, too: a list, a mapping "
            f"or a dataclass of them"
        )
    for path, leaf in found.items():
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor) or leaf.is_complex():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"output {nested.spelled(path)} is of type {kind}; allowed: tensors (floating, integer or boolean) and "
                f"None"
            )
        if is_differentiable(leaf) and leaf.dim() < 2 and not is_number(leaf):
            raise ValueError(
                f"output {nested.spelled(path)}: the model returned shape {tuple(leaf.shape)}; allowed: "
                f"(rows, width, ...) or one number, () or (1,)"
            )
    return found


def joined(parts: Sequence[dict[Path, Any]]) -> dict[Path, Any]:
    """Rows one micro-batch after another; the first one's numbers. ValueError where they do not fit."""
    for index, part in enumerate(parts):
        if part.keys() != parts[0].keys():
            names = [[nested.spelled(path) for path in each] for each in (parts[0], part)]
            raise ValueError(f"the model returned {names[0]} for micro-batch 0, but {names[1]} for micro-batch {index}")
    return {path: _joined(path, [part[path] for part in parts]) for path in parts[0]}


def _joined(path: Path, same: list[Any]) -> Tensor | None:
    kinds = {None if leaf is None else "number" if is_number(leaf) else tuple(leaf.shape[1:]) for leaf in same}
    if len(kinds) > 1:
        shapes = [None if leaf is None else tuple(leaf.shape) for leaf in same]
        raise ValueError(
            f"output {nested.spelled(path)} cannot be joined: over the micro-batches it is {shapes}; allowed: tensors "
            f"that differ in their first dimension only. Let the model return no more than what the loss needs"
        )
    if same[0] is None:
        return None
    return (same[0] if is_number(same[0]) else torch.cat(same)).detach()


def is_differentiable(leaf: Tensor | None) -> bool:
    return leaf is not None and leaf.is_floating_point()


def is_number(leaf: Tensor) -> bool:
    """One of the model, not of a row. An integer of shape (1,) is of a row."""
    return leaf.dim() == 0 or (leaf.is_floating_point() and leaf.shape == (1,))
