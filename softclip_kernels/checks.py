"""Every check of shape, dtype, device and value. Each error names the value, what is allowed and the way out.

Checks of tensor values read the tensor; they run for CPU tensors outside torch.compile, and never make a GPU wait.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any, SupportsIndex

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def embeddings(x: Any, y: Any, names: tuple[str, str] = ("x", "y")) -> None:
    """x (N, D) and y (M, D): tensors of one floating dtype and device, none of the sizes 0 in width."""
    for name, value in zip(names, (x, y), strict=True):
        tensor(name, value, " of shape (rows, width)")
        if value.layout != torch.strided:
            raise TypeError(f"{name} has layout {value.layout}; allowed: torch.strided, for example {name}.to_dense()")
        if value.dim() != 2:
            raise ValueError(f"{name} must have two dimensions (rows, width), not shape {tuple(value.shape)}")
        if value.dtype not in FLOATING:
            raise TypeError(f"{name} has dtype {value.dtype}; allowed: {', '.join(map(str, FLOATING))}")
        if value.shape[1] == 0:
            raise ValueError(f"{name} has width 0, shape {tuple(value.shape)}; at least 1 is needed")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{names[0]} and {names[1]} must have one width, not {x.shape[1]} and {y.shape[1]}")
    if x.dtype != y.dtype:
        raise TypeError(
            f"{names[0]} is {x.dtype} but {names[1]} is {y.dtype}; "
            f"cast one, for example {names[1]}.to({names[0]}.dtype)"
        )
    if x.device != y.device:
        raise ValueError(f"{names[0]} is on {x.device} but {names[1]} on {y.device}; move one with .to(device)")


def not_empty(n: int, m: int) -> None:
    if n == 0 or m == 0:
        raise ValueError(f"a loss over {n} rows and {m} columns is undefined; at least one of each is needed")


def tensor(name: str, value: Any, what: str = "") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor{what}, not {type(value).__name__}")


def logit_scale(value: Any, device: torch.device, name: str = "logit_scale") -> None:
    """A number, or a floating tensor of one element; already exponentiated, hence positive. In a tensor NaN and
    infinity pass, as in embeddings: a training run meets them, and skips the step that they make non-finite. 0 or less
    is a logarithm given as is."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(
                f"{name} must be a number or a tensor of one element, already exponentiated, not {type(value).__name__}"
            )
        positive_number(name, float(value))
        return
    if value.numel() != 1 or not value.dtype.is_floating_point:
        raise ValueError(
            f"{name} must be one floating number, already exponentiated, not shape {tuple(value.shape)} "
            f"of {value.dtype}"
        )
    if value.device != device and value.device.type != "cpu":
        raise ValueError(f"{name} is on {value.device} but the embeddings on {device}; move it with .to(device)")
    if _readable(value) and value.item() <= 0:
        raise ValueError(f"{name} is {value.item()}; it must be positive: pass the exponential of its logarithm")


def positive_number(name: str, value: float) -> None:
    number_in(name, value, torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)


def teacher_scale(name: str, value: Any, allowed: tuple[str, ...] = ()) -> None:
    """A positive number, a tensor (see logit_scale, which the embeddings' device is needed for), or one of the words
    allowed."""
    if isinstance(value, str) and allowed:
        one_of(name, value, allowed)
    elif not isinstance(value, Tensor):
        positive_number(name, value)


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")


def number_in(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [{low:g}, {high:g}] or a tensor, not {type(value).__name__}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}={value} must lie in [{low:g}, {high:g}]")


def whole_number(name: str, value: Any) -> int:
    """Of Python's or numpy's kind; a tensor is refused, as reading it may make a GPU wait."""
    if isinstance(value, Tensor) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}; pass int({name})")
    return operator.index(value)


def vector(name: str, value: Any, lengths: tuple[int, ...]) -> None:
    tensor(name, value)
    # Not `not in`: where a compiler traces, a number may be a symbol, which no tuple is found to hold.
    if value.dim() != 1 or all(len(value) != length for length in lengths):
        allowed = " or ".join(f"({length},)" for length in dict.fromkeys(lengths))
        raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed: {allowed}")


def probabilities(name: str, value: Tensor | float) -> None:
    """A number or values in [0, 1], NaN refused."""
    if not isinstance(value, Tensor):
        number_in(name, value, 0.0, 1.0)
    elif _readable(value) and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"{name} must lie in [0, 1], but holds {_extremes(value)}")


def non_negative(name: str, value: Tensor | float) -> None:
    if not isinstance(value, Tensor):
        number_in(name, value, 0.0, torch.finfo(torch.float32).max)
    elif _readable(value) and not bool((value >= 0).all() & value.isfinite().all()):
        raise ValueError(f"{name} must be finite and not negative, but holds {_extremes(value)}")


def potential(name: str, value: Tensor) -> None:
    """Finite, or -inf, which excludes."""
    if _readable(value) and not bool((value < torch.inf).all()):
        raise ValueError(f"{name} must be finite or -inf, but holds {_extremes(value)}")


def identifiers(name: str, value: Any) -> None:
    """Integers of any width, or booleans; floating ids would be cut."""
    tensor(name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: integers and booleans")


def indices(name: str, value: Any, length: int, columns: int) -> None:
    """A column number for each of `length` rows."""
    tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: torch.int64, torch.int32")
    vector(name, value, (length,))
    if _readable(value) and value.numel() and not 0 <= int(value.min()) <= int(value.max()) < columns:
        raise ValueError(f"{name} must lie in [0, {columns}), but holds {int(value.min())} to {int(value.max())}")


def own_segments(row_segment: Tensor, positive_segment: Tensor) -> None:
    """Every row's segment (N,) and the one of its positive (N,)."""
    if _readable(row_segment) and not torch.equal(row_segment, positive_segment):
        row = int((row_segment != positive_segment).nonzero()[0, 0])
        raise ValueError(
            f"row {row} is of segment {int(row_segment[row])} but its positive of {int(positive_segment[row])}; a row "
            f"must see its positive: give both one segment"
        )


def same_device(name: str, value: Any, device: torch.device) -> None:
    tensor(name, value)
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the embeddings on {device}; move it with .to(device)")


def square(what: str, n: int, m: int) -> None:
    if n != m:
        raise ValueError(f"{what} pairs row i with column i and needs as many rows as columns, not {n} and {m}")


def _readable(value: Tensor) -> bool:
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def _extremes(value: Tensor) -> str:
    return f"values from {value.min().item():g} to {value.max().item():g}"
