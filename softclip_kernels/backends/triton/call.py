"""A launch of a kernel that costs the host little."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import NoneType
from typing import Any, Protocol

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
        self.signature = _signature(kernel)
        self.compiled: CompiledKernel | None = None
        self.plain: list[Any] = []  # the arguments in order, as the compiled kernel takes them
        self.pointers: set[int] = set()  # which of them are tensors' pointers, where a pass is recorded

    def __call__(self, programs: int, **changing: Any) -> None:
        recording = recorder
        if self.compiled is not None:
            for name, value in changing.items():
                self.plain[self.signature.places[name]] = value.data_ptr() if isinstance(value, Tensor) else value
        else:
            arguments = self.signature.in_order(self.fixed | changing)
            self.plain, kinds = _plain_and_kinds(arguments, self.signature)
            kind = (id(self.kernel), *self.options.values(), *kinds)
            if recording is not None:
                self.pointers = {place for place, value in enumerate(arguments) if isinstance(value, Tensor)}
            self.compiled = _compiled.get(kind)
            if self.compiled is None:
                if recording is not None:
                    recording.interrupt()
                named = dict(zip(self.signature.places, arguments, strict=True))
                compiled = self.kernel[(programs,)](**named, **self.options)
                if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
                    _compiled[kind] = compiled
                return
        self.compiled[(programs, 1, 1)](*self.plain)
        if recording is not None:
            recording.note(self, programs)


class Launched(Protocol):
    """A launch that was made: a CompiledKernel or what passes for one, its arguments in order with pointers as plain
    numbers, and which they are."""

    compiled: Any
    plain: list[Any]
    pointers: set[int]


class Recorder(Protocol):
    """Is told of launches."""

    def note(self, launched: Launched, programs: int) -> None: ...

    def interrupt(self) -> None:
        """Something happens that the next pass of the kind will not need, such as a choice of tiles."""


recorder: Recorder | None = None  # of a pass that is to be replayed (replay.py)
_compiled: dict[Hashable, CompiledKernel] = {}


@dataclass(frozen=True)
class _Signature:
    """What a launch has to know of a kernel.

    kernel         itself: kept alive, since it is known by its id
    places         of every argument
    constants      where the constants of its code begin, which come last
    in_order       the arguments, out of a dict that may hold more
    unspecialized  the places of numbers that the kernel does not specialize on
    """

    kernel: Any
    places: dict[str, int]
    constants: int
    in_order: Callable[[dict[str, Any]], tuple[Any, ...]]
    unspecialized: tuple[int, ...]


_signatures: dict[int, _Signature] = {}


def _signature(kernel: Any) -> _Signature:
    signature = _signatures.get(id(kernel))  # a kernel's own hash is that of its source
    if signature is None:
        places = {name: place for place, name in enumerate(kernel.arg_names)}
        constants = sum(not name.isupper() for name in places)
        unspecialized = tuple(places[name] for name in getattr(kernel, "do_not_specialize", ()))
        signature = _Signature(kernel, places, constants, itemgetter(*places), unspecialized)
        _signatures[id(kernel)] = signature
    return signature


_AMD = bool(torch.version.hip)
_VALUES = frozenset([int, bool, float, str, NoneType])


def _plain_and_kinds(arguments: Sequence[Any], signature: _Signature) -> tuple[list[Any], list[Hashable]]:
    """The arguments with pointers as numbers, and what decides which code they run: the device, of a tensor its dtype
    and alignment (on AMD also whether 31 bits reach all of it), of a descriptor its dtype and box, and of every other
    argument that the kernel specializes on or has as a constant its value."""
    plain: list[Any] = list(arguments)
    kinds: list[Hashable] = list(arguments)
    for place, value in enumerate(arguments[: signature.constants]):
        kind = type(value)
        if kind in _VALUES:
            continue
        if kind is TensorDescriptor:  # handed on as it is
            kinds[place] = (value.base.dtype, *value.block_shape)
            continue
        tensor = value
        plain[place] = pointer = value.data_ptr()
        kinds[place] = value.dtype if pointer % 16 == 0 else (value.dtype, "unaligned")
        if _AMD:
            kinds[place] = (kinds[place], value.nbytes < 2**31)
    for place in signature.unspecialized:
        kinds[place] = arguments[place] < 2**31
    kinds.append(tensor.device)  # there is no kernel without a tensor, and all of a launch are on one device
    return plain, kinds


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def strides(**matrices: Tensor) -> dict[str, int]:
    """How matrices lie in memory, as every kernel takes it: NAME_stride from row to row, NAME_step along them."""
    result = {}
    for name, matrix in matrices.items():
        result[f"{name}_stride"], result[f"{name}_step"] = matrix.stride()
    return result
