"""NVIDIA's driver by ctypes: what is used of it, its errors by name.

libcuda.so.1 is opened at first use. Every entry point is looked up by its plain name: that is the one whose streams are
torch's (0 is the legacy default stream) and, of all that are used, the version declared here. `cuGetProcAddress` would
find the same. Structures and numbers are those of cuda.h from CUDA 12.0 on, which keeps them; tests/backends/
test_cuda_headers.py holds them against every cuda.h of the machine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

from . import Unavailable

LIBRARY = "libcuda.so.1"

# Of cuda.h.
INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_...


class LaunchAttributeValue(ctypes.Union):
    """CUlaunchAttributeValue"""

    _fields_ = [("cluster", c_uint * 3), ("opaque", c_uint64 * 8)]


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute"""

    _fields_ = [("id", c_uint), ("padding", c_uint), ("value", LaunchAttributeValue)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        ("grid_x", c_uint),
        ("grid_y", c_uint),
        ("grid_z", c_uint),
        ("block_x", c_uint),
        ("block_y", c_uint),
        ("block_z", c_uint),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(LaunchAttribute)),
        ("attribute_count", c_uint),
    ]


Handle = POINTER(c_void_p)  # where a call leaves a CUcontext, CUmodule or CUfunction

# Every call that is made, with its parameters; all return a CUresult.
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (Handle, c_int),
    "cuCtxGetCurrent": (Handle,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuModuleLoadData": (Handle, c_void_p),
    "cuModuleGetFunction": (Handle, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuFuncGetParamInfo": (c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)),
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
    "cuTensorMapEncodeTiled": (
        *(c_void_p, c_int, c_uint32, c_void_p),  # the map; type, rank, address of the matrix
        *(POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32), POINTER(c_uint32)),  # sizes, strides, box, steps
        *(c_int, c_int, c_int, c_int),  # interleave, swizzle, L2 promotion, fill
    ),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
SINCE = {"cuLaunchKernelEx": "11.8", "cuTensorMapEncodeTiled": "12.0"}
OPTIONAL = ("cuFuncGetParamInfo",)  # from CUDA 12.4 on


class DriverError(RuntimeError):
    """A call of the driver failed. `code` is its CUresult; the message names the call and the error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Driver:
    """The driver, initialised. `library` has the functions of PROTOTYPES as ctypes' function objects: the opened
    libcuda, or what stands in for it in a test.

    Raises Unavailable where one that is needed is missing, DriverError where the driver does not start.
    """

    def __init__(self, library: Any) -> None:
        self.library = library  # kept alive
        self.entries = {name: entry for name in PROTOTYPES if (entry := _entry(library, name)) is not None}
        self._contexts: dict[int, int] = {}
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Raises DriverError unless the call succeeds."""
        code = self.entries[name](*arguments)
        if code:
            raise self.error(name, code)

    def error(self, what: str, code: int) -> DriverError:
        """Of a call that returned `code`; `what` begins with its name."""
        return DriverError(f"{what} failed: {self._text('cuGetErrorName', code)} ({self._in_words(code)})", code)

    def version(self) -> str:
        """The latest CUDA that the driver supports, such as "12.8"."""
        version = c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def primary_context(self, device: int) -> int:
        """The context of torch's own work on the device of this index, retained for as long as the process lives."""
        if device not in self._contexts:
            handle, ordinal = c_void_p(), c_int()
            self.call("cuDeviceGet", ctypes.byref(ordinal), device)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), ordinal)
            self._contexts[device] = handle.value or 0
        return self._contexts[device]

    def current_context(self) -> int | None:
        handle = c_void_p()
        self.call("cuCtxGetCurrent", ctypes.byref(handle))
        return handle.value

    @contextmanager
    def on(self, context: int) -> Iterator[None]:
        """The context is the thread's current one, and afterwards that which was."""
        before = self.current_context()
        if before == context:
            yield
            return
        self.call("cuCtxSetCurrent", context)
        try:
            yield
        finally:
            self.call("cuCtxSetCurrent", before)

    def _text(self, name: str, code: int) -> str:
        text = c_char_p()
        failed = self.entries[name](code, ctypes.byref(text))
        return f"error {code}" if failed or text.value is None else text.value.decode(errors="replace")

    def _in_words(self, code: int) -> str:
        text = self._text("cuGetErrorString", code)
        return "which this driver does not know" if text == f"error {code}" else text


def _entry(library: Any, name: str) -> Callable[..., int] | None:
    try:
        function = getattr(library, name)
    except AttributeError:
        if name in OPTIONAL:
            return None
        since = f", which came with CUDA {SINCE[name]}: update the driver" if name in SINCE else ""
        raise Unavailable(f"NVIDIA's driver has no {name}{since}") from None
    return ctypes.cast(function, ctypes.CFUNCTYPE(c_int, *PROTOTYPES[name]))


@cache
def driver() -> Driver:
    """This machine's. Raises Unavailable where there is none, where it is too old or does not start."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise Unavailable(f"there is no NVIDIA driver ({error})") from error
    try:
        return Driver(library)
    except DriverError as error:
        raise Unavailable(f"NVIDIA's driver does not start: {error}") from error
