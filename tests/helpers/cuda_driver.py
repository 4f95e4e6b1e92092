"""A driver of CUDA without a GPU: it reads what it is handed as the driver would, from the pointers, and notes it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from softclip_kernels.backends.cuda.driver import (
    CLUSTER_DIMENSION,
    INVALID_CONTEXT,
    INVALID_VALUE,
    MAX_DYNAMIC_SHARED_SIZE_BYTES,
    PROTOTYPES,
    LaunchConfig,
)

SHARED_WITHOUT_ASKING = 48 * 1024
NOT_FOUND, INVALID_HANDLE, INVALID_IMAGE, UNKNOWN = 500, 400, 200, 999
ERRORS = {
    INVALID_VALUE: ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
    INVALID_IMAGE: ("CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"),
    INVALID_CONTEXT: ("CUDA_ERROR_INVALID_CONTEXT", "invalid device context"),
    INVALID_HANDLE: ("CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"),
    NOT_FOUND: ("CUDA_ERROR_NOT_FOUND", "named symbol not found"),
    UNKNOWN: ("CUDA_ERROR_UNKNOWN", "unknown error"),
}


@dataclass(frozen=True)
class Launched:
    """parameters: the bytes of every one; cluster: of the attribute, None where a launch has none."""

    name: str
    context: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] | None
    shared_bytes: int
    stream: int | None
    parameters: list[bytes]


@dataclass(frozen=True)
class Encoded:
    """A tensor map, all lists innermost first; `options` are interleave, swizzle, L2 promotion and fill."""

    dtype: int
    address: int | None
    sizes: list[int]
    strides: list[int]
    box: list[int]
    steps: list[int]
    options: tuple[int, ...]


class StandIn:
    """In the place of the opened libcuda.

    kernels   name to the sizes of the parameters, of every kernel in every cubin
    fails     name to the code that this call returns instead of doing anything
    lacks     names of calls that this driver does not have
    called    the names of all calls, in order
    modules   (context, cubin) of every one
    launched  every launch; `encoded`: every tensor map; `filled`: (address, value, bytes, stream) of every memset
    """

    VERSION = 12080

    def __init__(
        self, kernels: Mapping[str, Sequence[int]], fails: Mapping[str, int] | None = None, lacks: Sequence[str] = ()
    ) -> None:
        self.kernels, self.fails = kernels, dict(fails or {})
        self.called: list[str] = []
        self.modules: list[tuple[int, bytes]] = []
        self.launched: list[Launched] = []
        self.encoded: list[Encoded] = []
        self.filled: list[tuple[int, int, int, int]] = []
        self._functions: list[tuple[int, str]] = []  # context and name; a handle is 3000 + the place
        self._shared: dict[int, int] = {}
        self._thread = threading.local()
        for name, parameters in PROTOTYPES.items():
            if name not in lacks:
                setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *parameters)(partial(self._noted, name)))

    @property
    def current(self) -> int | None:
        """The context of this thread."""
        return getattr(self._thread, "context", None)

    @current.setter
    def current(self, context: int | None) -> None:
        self._thread.context = context

    def _noted(self, name: str, *arguments: Any) -> int:
        self.called.append(name)
        if name in self.fails:
            return self.fails[name]
        method: Callable[..., int | None] = getattr(self, f"_{name}")
        return method(*arguments) or 0

    def _cuInit(self, flags: int) -> int:
        return 0 if flags == 0 else INVALID_VALUE

    def _cuMemsetD8Async(self, address: int, value: int, count: int, stream: int | None) -> None:
        self.filled.append((address, value, count, stream or 0))

    def _cuDriverGetVersion(self, version: Any) -> None:
        version[0] = self.VERSION

    def _cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device[0] = ordinal

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context[0] = 1000 + device

    def _cuCtxGetCurrent(self, context: Any) -> None:
        context[0] = self.current

    def _cuCtxSetCurrent(self, context: int | None) -> None:
        self.current = context

    def _cuModuleLoadData(self, module: Any, cubin: int) -> int:
        if self.current is None:
            return INVALID_CONTEXT
        self.modules.append((self.current, ctypes.string_at(cubin)))
        module[0] = 2000 + len(self.modules) - 1
        return 0

    def _cuModuleGetFunction(self, function: Any, module: int, name: bytes) -> int:
        if name.decode() not in self.kernels:
            return NOT_FOUND
        self._functions.append((self.modules[module - 2000][0], name.decode()))
        function[0] = 3000 + len(self._functions) - 1
        return 0

    def _cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> int:
        if attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES:
            return INVALID_VALUE
        self._shared[function] = value
        return 0

    def _cuFuncGetParamInfo(self, function: int, place: int, offset: Any, size: Any) -> int:
        sizes = self.kernels[self._functions[function - 3000][1]]
        if place >= len(sizes):
            return INVALID_VALUE
        offset[0], size[0] = sum(sizes[:place]), sizes[place]
        return 0

    def _cuLaunchKernelEx(self, config_at: int, function: int, parameters_at: int, extra: int | None) -> int:
        config = LaunchConfig.from_address(config_at)
        context, name = self._functions[function - 3000]
        if self.current is None:
            return INVALID_CONTEXT
        if self.current != context:
            return INVALID_HANDLE
        if config.shared_bytes > self._shared.get(function, SHARED_WITHOUT_ASKING) or extra is not None:
            return INVALID_VALUE
        attributes = [config.attributes[place] for place in range(config.attribute_count)]
        if any(attribute.id != CLUSTER_DIMENSION for attribute in attributes):
            return INVALID_VALUE
        sizes = self.kernels[name]
        pointers = (ctypes.c_void_p * len(sizes)).from_address(parameters_at)
        self.launched.append(
            Launched(
                name,
                context,
                (config.grid_x, config.grid_y, config.grid_z),
                (config.block_x, config.block_y, config.block_z),
                tuple(attributes[0].value.cluster) if attributes else None,
                config.shared_bytes,
                config.stream,
                [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes, strict=True)],
            )
        )
        return 0

    def _cuTensorMapEncodeTiled(self, tensor_map: int, dtype: int, rank: int, address: int | None, *rest: Any) -> int:
        sizes, strides, box, steps, *options = rest
        if tensor_map % 128:
            return INVALID_VALUE
        self.encoded.append(
            Encoded(dtype, address, sizes[:rank], strides[: rank - 1], box[:rank], steps[:rank], tuple(options))
        )
        ctypes.memmove(tensor_map, self.map_bytes(len(self.encoded) - 1), 128)
        return 0

    @staticmethod
    def map_bytes(place: int) -> bytes:
        """What the map of this place in `encoded` holds."""
        return bytes([place + 1]) * 128

    def _cuGetErrorName(self, code: int, text: Any) -> int:
        return self._error(code, text, 0)

    def _cuGetErrorString(self, code: int, text: Any) -> int:
        return self._error(code, text, 1)

    def _error(self, code: int, text: Any, which: int) -> int:
        if code not in ERRORS:
            return INVALID_VALUE
        self._kept = ERRORS[code][which].encode()
        text[0] = self._kept
        return 0
