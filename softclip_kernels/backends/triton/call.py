"""A launch of a kernel that costs the host little."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor


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
        self.kernel, self.fixed, self.options = kernel, fixed, options
        self.compiled: CompiledKernel | None = None
        self.plain: list[Any] = []  # the arguments in order, as the compiled kernel takes them

    def __call__(self, programs: int, **changing: Any) -> None:
        places, unspecialized = _signature(self.kernel)
        if self.compiled is not None:
            for name, value in changing.items():
                self.plain[places[name]] = value.data_ptr() if isinstance(value, Tensor) else value
        else:
            arguments = [changing[name] if name in changing else self.fixed[name] for name in places]
            self.plain, kinds = _plain_and_kinds(arguments, unspecialized)
            kind = (id(self.kernel), *self.options.values(), *kinds)
            self.compiled = _compiled.get(kind)
            if self.compiled is None:
                named = dict(zip(places, arguments, strict=True))
                compiled = self.kernel[(programs,)](**named, **self.options)
                if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
                    _compiled[kind] = compiled
                return
        self.compiled[(programs, 1, 1)](*self.plain)


_compiled: dict[Hashable, CompiledKernel] = {}


@functools.cache
def _signature(kernel: Any) -> tuple[dict[str, int], frozenset[int]]:
    """The place of every argument, and the places of numbers that the kernel does not specialize on."""
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    return places, frozenset(places[name] for name in getattr(kernel, "do_not_specialize", ()))


def _plain_and_kinds(arguments: list[Any], unspecialized: frozenset[int]) -> tuple[list[Any], list[Hashable]]:
    """The arguments with pointers as numbers, and what decides which code they run: of a tensor its dtype, alignment
    and device (on AMD also whether 31 bits reach all of it), of a descriptor its dtype, box and device, and of every
    other argument that the kernel specializes on or has as a constant its value."""
    plain: list[Any] = []
    kinds: list[Hashable] = []
    for place, value in enumerate(arguments):
        if isinstance(value, Tensor):
            pointer = value.data_ptr()
            plain.append(pointer)
            kinds += (value.dtype, pointer % 16, value.device)
            if torch.version.hip:
                kinds.append(value.nbytes < 2**31)
        elif isinstance(value, TensorDescriptor):  # handed on as it is
            plain.append(value)
            kinds += (value.base.dtype, *value.block_shape, value.base.device)
        else:
            plain.append(value)
            kinds.append(value < 2**31 if place in unspecialized else value)
    return plain, kinds


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def strides(**matrices: Tensor) -> dict[str, int]:
    """How matrices lie in memory, as every kernel takes it: NAME_stride from row to row, NAME_step along them."""
    return {
        f"{name}_{which}": stride
        for name, matrix in matrices.items()
        for which, stride in zip(("stride", "step"), matrix.stride(), strict=True)
    }
