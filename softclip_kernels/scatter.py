"""Sums of rows that share a place, bitwise repeatable on every device."""

from __future__ import annotations

from torch import Tensor


def add_rows(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """`total[index[i]] += values[i]`, in place; total (M, ...), index (N,), values (N, ...). On CUDA index_add uses
    atomics, whose order changes from run to run; index_put sorts first."""
    if total.device.type == "cpu":
        return total.index_add_(0, index, values)
    return total.index_put_((index,), values, accumulate=True)


def sum_rows(length: int, index: Tensor, values: Tensor) -> Tensor:
    """The sum of the values (N, ...) at each of `length` places: (length, ...), differentiable."""
    return add_rows(values.new_zeros(length, *values.shape[1:]), index, values)
