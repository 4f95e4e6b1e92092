"""Deterministic scatter-add and gather over rows, and iteration over slices of rows."""

from __future__ import annotations

from torch import Tensor

AT_A_TIME = {"cpu": 1024, "cuda": 8192}  # bounds temporaries of the rows' width


def scatter_add(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """`total[index[i]] += values[i]`, in place; total (M, ...), index (N,), values (N, ...). Repeats bit for bit: on
    CUDA index_add uses atomics, whose order changes from run to run, while index_put sorts first."""
    if total.device.type == "cpu":
        return total.index_add_(0, index, values)
    return total.index_put_((index,), values, accumulate=True)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]`, (len(index), ...), with a gradient that repeats bit for bit. On CPUs that of plain indexing adds
    by atomics where there are several threads."""
    return values.index_select(0, index) if values.device.type == "cpu" else values[index]


def scatter_sum(length: int, index: Tensor, values: Tensor) -> Tensor:
    """The sum of the values (N, ...) at each of `length` places: (length, ...), differentiable."""
    return scatter_add(values.new_zeros(length, *values.shape[1:]), index, values)


def row_slices(tensor: Tensor) -> list[slice]:
    """Slices that cover the rows of the tensor, AT_A_TIME in each."""
    step = AT_A_TIME.get(tensor.device.type, AT_A_TIME["cuda"])
    return [slice(start, start + step) for start in range(0, len(tensor), step)]
