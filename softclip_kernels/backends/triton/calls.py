"""A kernel with its arguments, launched for one super-block after the other at little cost to the host.

The ordinary launch binds, inspects and hashes every argument again, which takes longer than the GPU takes for a small
super-block. Between super-blocks only pointers of equal alignment and positions that the kernels do not specialise on
change, so what was compiled for the first one serves all: it takes the arguments in order, constants included, and
pointers as plain numbers, which spares a query of the driver for each (triton 3.4 to 3.9).
"""

from __future__ import annotations

from typing import Any

import torch
from triton.compiler import CompiledKernel


class Call:
    """`Call(kernel, fixed, options)(programs, **changing)` is `kernel[(programs,)](**fixed, **changing, **options)`.
    The changing arguments must be the same ones every time, of the same types; a tensor stays one, None stays None."""

    def __init__(self, kernel: Any, fixed: dict[str, Any], options: dict[str, int]) -> None:
        self.kernel, self.fixed, self.options = kernel, fixed, options
        self.compiled: CompiledKernel | None = None
        self.values: list[Any] = []
        self.places: dict[str, int] = {}

    def __call__(self, programs: int, **changing: Any) -> None:
        if self.compiled is not None:
            for name, value in changing.items():
                self.values[self.places[name]] = _plain(value)
            self.compiled[(programs, 1, 1)](*self.values)
            return
        compiled = self.kernel[(programs,)](**self.fixed, **changing, **self.options)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            arguments = self.fixed | changing
            self.values = [_plain(arguments[name]) for name in self.kernel.arg_names]
            self.places = {name: index for index, name in enumerate(self.kernel.arg_names)}
            self.compiled = compiled


def _plain(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value
