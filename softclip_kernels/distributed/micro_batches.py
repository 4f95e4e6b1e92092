"""A batch cut into micro-batches of consecutive rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from . import nested


def split_batch(
    batch: Any,
    *,
    count: int | None = None,
    size: int | None = None,
    tokens: int | None = None,
    lengths: Tensor | Sequence[int] | None = None,
) -> list[Any]:
    """Micro-batches for TwoPass, in the order of the rows, so that labels of the batch stay aligned.

        split_batch((images, texts), count=4)                       # sizes that differ by one at most
        split_batch({"images": images, "texts": texts}, size=64)    # the last one may be smaller
        split_batch(batch, tokens=16384, lengths=mask.sum(1))       # rows x longest row <= 16384

    batch    a tuple, list, mapping or dataclass, also nested, of tensors of shape (rows, ...). None, numbers, booleans
             and tensors of shape () go into every micro-batch
    count    how many micro-batches. With fewer rows some are empty
    size     rows of a micro-batch
    tokens   what a micro-batch may hold, padded to its longest row; `lengths`, one integer a row, says how long rows
             are. Ranks may get different numbers of micro-batches, which fully_shard and DeepSpeed do not take

    A list of the batch's type (of dicts for a mapping), of views. ValueError: not one of count, size and tokens; one
    that is not positive; a row longer than `tokens`; tensors with different numbers of rows. TypeError: a leaf of
    another type.
    """
    leaves = dict(nested.leaves(batch))
    rows = _rows(leaves)
    given = {name: each for name, each in (("count", count), ("size", size), ("tokens", tokens)) if each is not None}
    if len(given) != 1:
        raise ValueError(f"exactly one of count, size and tokens is needed, not {sorted(given) or 'none'}")
    ((name, value),) = given.items()
    if value < 1:
        raise ValueError(f"{name}={value}; at least 1 is needed")
    if (tokens is None) != (lengths is None):
        raise ValueError("tokens and lengths go together: the budget, and how long every row is")
    if count is not None:
        edges = [rows // count * k + min(k, rows % count) for k in range(count + 1)]
    elif size is not None:
        edges = [*range(0, max(rows, 1), size), rows]
    else:
        edges = [*_within(value, lengths, rows), rows]
    return [
        nested.rebuilt(batch, {path: leaf[begin:end] if _has_rows(leaf) else leaf for path, leaf in leaves.items()})
        for begin, end in pairwise(edges)
    ]


def _rows(leaves: dict[nested.Path, Any]) -> int:
    counts = {}
    for path, leaf in leaves.items():
        if _has_rows(leaf):
            counts[nested.spelled(path)] = len(leaf)
        elif not isinstance(leaf, (Tensor, int, float, type(None))):
            raise TypeError(f"{nested.spelled(path)} is a {type(leaf).__name__}; allowed: tensors, numbers and None")
    if len(set(counts.values())) != 1:
        raise ValueError(f"the batch's tensors must have one number of rows, not {counts}")
    return next(iter(counts.values()))


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _within(tokens: int, lengths: Any, rows: int) -> Iterator[int]:
    """Where micro-batches begin of at most `tokens` tokens, padded."""
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if len(lengths) != rows:
        raise ValueError(f"lengths has {len(lengths)} entries; the batch has {rows} rows")
    yield 0
    begin = longest = 0
    for row, length in enumerate(lengths):
        if length > tokens:
            raise ValueError(f"row {row} has {length} tokens, more than tokens={tokens} allows in a micro-batch")
        longest = max(longest, length)
        if longest * (row + 1 - begin) > tokens:
            yield row
            begin, longest = row, length
