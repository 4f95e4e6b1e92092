"""A launch of a CUDA C++ kernel, as call.py's is of a Triton kernel: the same to who records it (recorder.py)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from ctypes import c_int, c_uint64
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cuda.driver import driver
from ..cuda.launch import Function, Launch
from ..cuda.tensor_map import TensorMap
from . import call


class Box(NamedTuple):
    """An argument that is a tensor map: of a matrix, by boxes of (rows, columns)."""

    matrix: Tensor
    shape: tuple[int, int]


class CudaCall:
    """`CudaCall(function, threads, arguments)(blocks, {place: value, ...})`: arguments in the kernel's order, each a
    Box, a tensor or None for its pointer, or an int, of which the ints may change from launch to launch."""

    def __init__(self, function: Function, threads: int, arguments: Sequence[Any]) -> None:
        matrices = [argument.matrix if isinstance(argument, Box) else argument for argument in arguments]
        self.tensors = [matrix for matrix in matrices if isinstance(matrix, Tensor)]  # alive as long as this
        self.device = self.tensors[0].device
        self.compiled = _Prepared(function, threads, arguments)
        self.pointers = {place for place, value in enumerate(matrices) if isinstance(value, Tensor)}
        self.plain = [value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in matrices]

    def __call__(self, blocks: int, changing: dict[int, int]) -> None:
        for place, value in changing.items():
            self.plain[place] = value
        launched(self, blocks)


class Zeros:
    """`Zeros(tensor)()` fills it with zeros."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.device = tensor, tensor.device  # alive as long as this
        self.compiled = _Filling(tensor.nbytes)
        self.pointers, self.plain = {0}, [tensor.data_ptr()]

    def __call__(self) -> None:
        launched(self, 1)


def launched(one: CudaCall | Zeros, blocks: int) -> None:
    one.compiled.on(torch.cuda.current_stream(one.device).cuda_stream, blocks, one.plain)
    if call.recorder is not None:
        call.recorder.note(one, blocks)


class _Compiled:
    """What a recorded launch keeps, without a tensor: of triton's CompiledKernel as much as recording.py uses."""

    function = packed_metadata = None

    def on(self, stream: int, blocks: int, values: Sequence[int]) -> None:
        raise NotImplementedError

    def run(self, blocks: int, *others: Any) -> None:
        """As triton's launchers take it: two numbers of blocks, the stream, five things, and the arguments."""
        self.on(others[2], blocks, others[8:])

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *values, stream: self.on(stream, grid[0], values)


class _Prepared(_Compiled):
    def __init__(self, function: Function, threads: int, arguments: Sequence[Any]) -> None:
        self.threads = threads
        self.cells = [_cell(argument) for argument in arguments]
        self.launch = Launch(function, self.cells)
        self.lock = threading.Lock()  # replays of two threads share the cells

    def on(self, stream: int, blocks: int, values: Sequence[int]) -> None:
        with self.lock:
            for cell, value in zip(self.cells, values, strict=True):
                if type(cell) is TensorMap:
                    cell.move(value)
                else:
                    cell.value = value
            self.launch(blocks, self.threads, 1, stream)


def _cell(argument: Any) -> Any:
    if isinstance(argument, Box):
        return TensorMap.of(argument.matrix, argument.shape)
    return c_int(argument) if isinstance(argument, int) else c_uint64()


class _Filling(_Compiled):
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def on(self, stream: int, blocks: int, values: Sequence[int]) -> None:
        driver().call("cuMemsetD8Async", values[0], 0, self.nbytes, stream)
