"""Modules, functions, and a launch that costs the host little."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_size_t, c_void_p
from typing import Any

from .driver import (
    CLUSTER_DIMENSION,
    INVALID_CONTEXT,
    INVALID_VALUE,
    MAX_DYNAMIC_SHARED_SIZE_BYTES,
    Driver,
    LaunchAttribute,
    LaunchConfig,
    driver,
)
from .tensor_map import TensorMap

Argument = Any  # a number of ctypes (c_void_p, c_uint64, c_int32, c_float, ...) or a TensorMap


class Module:
    """A cubin, loaded on the device of this index for as long as the process lives. Raises DriverError."""

    def __init__(self, cubin: bytes, device: int, using: Driver | None = None) -> None:
        self.driver = using or driver()
        self.context = self.driver.primary_context(device)
        self.handle = c_void_p()
        self._shared_bytes: dict[str, int] = {}
        with self.driver.on(self.context):
            self.driver.call("cuModuleLoadData", ctypes.byref(self.handle), cubin)

    def function(self, name: str, shared_bytes: int = 0) -> Function:
        """The kernel `extern "C" __global__ void name(...)`, launched with so much dynamic shared memory."""
        handle = c_void_p()
        # A limit belongs to the kernel, not to the Function: it is never taken back for another Function.
        most = max(shared_bytes, self._shared_bytes.get(name, 0))
        with self.driver.on(self.context):
            code = self.driver.entries["cuModuleGetFunction"](ctypes.byref(handle), self.handle, name.encode())
            if code:
                raise self.driver.error(f"cuModuleGetFunction of {name}", code)
            if most:
                self.driver.call("cuFuncSetAttribute", handle, MAX_DYNAMIC_SHARED_SIZE_BYTES, most)
            sizes = self._parameter_bytes(handle)
        self._shared_bytes[name] = most
        return Function(self, name, handle, shared_bytes, sizes)

    def _parameter_bytes(self, function: c_void_p) -> list[int] | None:
        """Of every parameter; None where the driver is too old to say."""
        entry = self.driver.entries.get("cuFuncGetParamInfo")
        if entry is None:
            return None
        sizes: list[int] = []
        offset, size = c_size_t(), c_size_t()
        while True:
            code = entry(function, len(sizes), ctypes.byref(offset), ctypes.byref(size))
            if code == INVALID_VALUE:  # there is no such parameter
                return sizes
            if code:
                raise self.driver.error("cuFuncGetParamInfo", code)
            sizes.append(size.value)


class Function:
    """A kernel of a module.

    handle           its CUfunction
    shared_bytes     dynamic shared memory of a launch
    parameter_bytes  the size of every parameter; None where the driver is too old to say
    """

    def __init__(
        self, module: Module, name: str, handle: c_void_p, shared_bytes: int, parameter_bytes: list[int] | None
    ) -> None:
        self.module = module
        self.name = name
        self.handle = handle
        self.shared_bytes = shared_bytes
        self.parameter_bytes = parameter_bytes


class Launch:
    """A launch, prepared once and made often: `Launch(function, arguments)(grid, block, cluster, stream)`.

    `arguments` are in the kernel's order: numbers of ctypes, whose `.value` may be changed between launches, and
    TensorMaps, which may be encoded again; the driver copies all of them before a launch returns. Raises TypeError
    where they are not what the kernel takes. Two threads need a Launch each.

    The launch works in the thread's current context, as do torch's own (`torch.cuda.device`); where a thread has none
    yet, in the module's.
    """

    def __init__(self, function: Function, arguments: Sequence[Argument]) -> None:
        self.function = function
        self.arguments = list(arguments)
        self._check(function)
        self._pointers = (c_void_p * len(self.arguments))(*map(_address, self.arguments))
        self._attribute = LaunchAttribute(id=CLUSTER_DIMENSION)
        self._attribute.value.cluster[:] = (1, 1, 1)
        self._cluster = self._attribute.value.cluster  # a view
        self._config = LaunchConfig(
            grid_y=1,
            grid_z=1,
            block_y=1,
            block_z=1,
            shared_bytes=function.shared_bytes,
            attributes=ctypes.pointer(self._attribute),
        )
        self._entry = function.module.driver.entries["cuLaunchKernelEx"]
        self._fixed = (ctypes.addressof(self._config), function.handle.value, ctypes.addressof(self._pointers), None)

    def __call__(self, grid: int, block: int, cluster: int, stream: int) -> None:
        """Blocks, a multiple of `cluster`; threads a block; blocks a cluster, 1 for none; the CUstream, as torch has it
        (`torch.cuda.current_stream().cuda_stream`). Raises DriverError."""
        config = self._config
        config.grid_x = grid
        config.block_x = block
        config.stream = stream
        config.attribute_count = cluster > 1
        self._cluster[0] = cluster
        code = self._entry(*self._fixed)
        if code:
            self._again(code)

    def _again(self, code: int) -> None:
        """A thread that has not worked on a GPU yet, such as autograd's, has no context: it gets the module's."""
        driver = self.function.module.driver
        if code == INVALID_CONTEXT and driver.current_context() is None:
            driver.call("cuCtxSetCurrent", self.function.module.context)
            code = self._entry(*self._fixed)
        if code:
            config = self._config
            raise driver.error(
                f"cuLaunchKernelEx of {self.function.name} (grid {config.grid_x}, block {config.block_x}, cluster "
                f"{self._cluster[0]}, {config.shared_bytes} bytes of shared memory)",
                code,
            )

    def _check(self, function: Function) -> None:
        given = [_bytes(argument) for argument in self.arguments]
        if function.parameter_bytes is not None and given != function.parameter_bytes:
            raise TypeError(
                f"{function.name} takes parameters of {function.parameter_bytes} bytes, and the arguments have {given}"
            )


def _address(argument: Argument) -> int:
    return argument.address if isinstance(argument, TensorMap) else ctypes.addressof(argument)


def _bytes(argument: Argument) -> int:
    return TensorMap.BYTES if isinstance(argument, TensorMap) else ctypes.sizeof(argument)
