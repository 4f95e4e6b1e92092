"""Merging of partial statistics: blocks of columns of one row (or of rows of one column) combine in any order.

A statistic is laid out as Statistics.rows: (1 + 2K, L), a log-sum-exp, then for each teacher its log-sum-exp and the
mean of the student's logits under it. Log-sum-exps merge by logaddexp; a mean merges weighted by its own normaliser.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty(teachers: int, length: int, like: Tensor) -> Tensor:
    """The neutral element: nothing seen yet. Shape (1 + 2 * teachers, length), dtype and device of `like`."""
    statistic = like.new_zeros(1 + 2 * teachers, length)
    statistic[0] = -torch.inf
    statistic[1::2] = -torch.inf
    return statistic


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The statistic of the union of two disjoint parts. Both (1 + 2K, L)."""
    merged = torch.empty_like(a)
    merged[0] = torch.logaddexp(a[0], b[0])
    merged[1::2] = torch.logaddexp(a[1::2], b[1::2])
    merged[2::2] = _weight(a[1::2], b[1::2]) * a[2::2] + _weight(b[1::2], a[1::2]) * b[2::2]
    return merged


def _weight(part: Tensor, other: Tensor) -> Tensor:
    """The part's share `exp(part) / (exp(part) + exp(other))`, as a sigmoid: the two shares sum to exactly 1."""
    return torch.where(part == -torch.inf, 0.0, torch.sigmoid(part - other))
