"""Every check of shape, dtype, device and value. Each error names the value, what is allowed and the way out.

Checks of tensor values read the tensor; they run for CPU tensors outside torch.compile, and never make a GPU wait.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def embeddings(x: Any, y: Any, names: tuple[str, str] = ("x", "y")) -> None:
    """x (N, D) and y (M, D): tensors of one floating dtype and device, none of the sizes 0 in width."""
    for name, value in zip(names, (x, y), strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of shape (rows, width), not {type(value).__name__}")
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


def logit_scale(value: Any, device: torch.device) -> None:
    """A floating tensor of one element, already exponentiated, hence positive and finite."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"logit_scale must be a tensor of one element, already exponentiated, not {type(value).__name__}; "
            f"wrap a constant as torch.tensor({value!r})"
        )
    if value.numel() != 1 or not value.dtype.is_floating_point:
        raise ValueError(
            f"logit_scale must be one floating number, already exponentiated, not shape {tuple(value.shape)} "
            f"of {value.dtype}"
        )
    if value.device != device and value.device.type != "cpu":
        raise ValueError(f"logit_scale is on {value.device} but the embeddings on {device}; move it with .to(device)")
    if _readable(value) and value.item() < 0:
        raise ValueError(f"logit_scale is {value.item()}; it must be positive: pass log_scale.exp()")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")


def number_in(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}={value} must lie in [{low:g}, {high:g}]")


def vector(name: str, value: Tensor, lengths: tuple[int, ...]) -> None:
    if value.dim() != 1 or len(value) not in lengths:
        allowed = " or ".join(f"({length},)" for length in dict.fromkeys(lengths))
        raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed: {allowed}")


def probabilities(name: str, value: Tensor) -> None:
    """Values in [0, 1], NaN refused."""
    if _readable(value) and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"{name} must lie in [0, 1], but holds {_extremes(value)}")


def non_negative(name: str, value: Tensor) -> None:
    if _readable(value) and not bool((value >= 0).all() & value.isfinite().all()):
        raise ValueError(f"{name} must be finite and not negative, but holds {_extremes(value)}")


def integers(name: str, value: Tensor, length: int) -> None:
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: torch.int64, torch.int32")
    vector(name, value, (length,))


def indices(name: str, value: Tensor, length: int, columns: int) -> None:
    """A column number for each of `length` rows."""
    integers(name, value, length)
    if _readable(value) and value.numel() and not 0 <= int(value.min()) <= int(value.max()) < columns:
        raise ValueError(f"{name} must lie in [0, {columns}), but holds {int(value.min())} to {int(value.max())}")


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the embeddings on {device}; move it with .to(device)")


def square(what: str, n: int, m: int) -> None:
    if n != m:
        raise ValueError(f"{what} pairs row i with column i and needs as many rows as columns, not {n} and {m}")


def _readable(value: Tensor) -> bool:
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def _extremes(value: Tensor) -> str:
    return f"values from {value.min().item():g} to {value.max().item():g}"
