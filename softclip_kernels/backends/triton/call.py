"""A launch of a kernel that costs the host little."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel


class Call:
    """`Call(kernel, fixed, options)(programs, **changing)` is `kernel[(programs,)](**fixed, **changing, **options)`,
    at little cost to the host once a launch of its kind was made. `fixed` may hold more than the kernel takes.

    The ordinary launch binds, inspects and hashes every argument again, which takes longer than the GPU takes for a
    small super-block. A later launch with arguments of the same kind hands Triton's compiled kernel its arguments in
    order, constants included, and pointers as plain numbers, which spares a query of the driver for each (triton 3.4 to
    3.9). Between the launches of one Call only pointers of equal alignment and numbers that the kernel does not
    specialize on may change: a tensor stays one, None stays None.
    """

    def __init__(self, kernel: Any, fixed: dict[str, Any], options: dict[str, int]) -> None:
        self.kernel, self.options = kernel, options
        self.fixed = {name: fixed[name] for name in kernel.arg_names if name in fixed}
        self.compiled: CompiledKernel | None = None
        self.plain: dict[str, Any] = {}

    def __call__(self, programs: int, **changing: Any) -> None:
        if self.compiled is not None:
            self.plain |= {name: _plain(value) for name, value in changing.items()}
        else:
            arguments = self.fixed | changing
            kind = _kind(self.kernel, arguments, self.options)
            self.compiled = _compiled.get(kind)
            if self.compiled is None:
                compiled = self.kernel[(programs,)](**arguments, **self.options)
                if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
                    _compiled[kind] = compiled
                return
            self.plain = {name: _plain(arguments[name]) for name in self.kernel.arg_names}
        self.compiled[(programs, 1, 1)](*self.plain.values())


_compiled: dict[Hashable, CompiledKernel] = {}


def _kind(kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> Hashable:
    """What decides which code a launch runs: of a tensor its dtype, alignment and device (on AMD also whether 31 bits
    reach all of it), and the value of everything that the kernel specializes on or has as a constant."""
    free = getattr(kernel, "do_not_specialize", ())
    return (
        id(kernel),
        *options.values(),
        *(
            (value.dtype, value.data_ptr() % 16, value.device, torch.version.hip and value.nbytes < 2**31)
            if isinstance(value, Tensor)
            else (name in free and value < 2**31) or value
            for name, value in arguments.items()
        ),
    )


def _plain(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value
