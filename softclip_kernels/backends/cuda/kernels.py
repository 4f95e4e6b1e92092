"""A kernel by file and name, compiled once a process and device; whether a device can run any."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from . import Unavailable, cache, sources
from .driver import driver
from .launch import Function, Module
from .nvrtc import nvrtc

VARIABLE = "SOFTCLIP_CUDA"
CAPABILITY = (9, 0)  # the architecture's own instructions run on no other
OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17", "--generate-line-info")

Defines = tuple[tuple[str, str | int], ...]

_lock = threading.Lock()
_modules: dict[tuple[int, str, Defines], Module] = {}
_functions: dict[tuple[int, str, Defines, str, int], Function] = {}
_reasons: dict[int, str | None] = {}


def kernel(file: str, name: str, defines: Defines, shared_bytes: int, device: torch.device) -> Function:
    """The kernel `extern "C" __global__ void name(...)` of csrc/cuda/file, compiled with these macros and launched with
    so much dynamic shared memory. Of a file and its macros a device has one module.

    device: one for which `why_not` gave None. The first call may compile, which takes seconds, and loads, which no
    CUDA graph may capture; a later one is a look-up. Raises nvrtc.CompileError, driver.DriverError, Unavailable, and
    ValueError where there is no such file.
    """
    index = _index(device)
    module_key = (index, file, defines)
    key = (*module_key, name, shared_bytes)
    function = _functions.get(key)
    if function is not None:
        return function
    with _lock:  # and then again, since another thread may have been first
        if module_key not in _modules:
            _modules[module_key] = Module(cubin(file, defines), index)
        if key not in _functions:
            _functions[key] = _modules[module_key].function(name, shared_bytes)
        return _functions[key]


def loaded(device: torch.device, *kernel_of: Any) -> bool:
    """Whether `kernel(*kernel_of, device)` would only look it up."""
    file, name, defines, shared_bytes = kernel_of
    return (_index(device), file, defines, name, shared_bytes) in _functions


def cubin(file: str, defines: Defines) -> bytes:
    """Compiled, or kept from another process. Raises as `kernel` does."""
    compiler, text, headers = nvrtc(), sources.text(file), sources.headers()
    options = [*OPTIONS, *(f"--define-macro={name}={value}" for name, value in defines)]
    key = cache.key(file=file, text=text, headers=headers, options=options, nvrtc=compiler.version)
    return cache.cubin(key, lambda: compiler.compile(file, text, headers, options))


def forced() -> bool:
    """Whether SOFTCLIP_CUDA asks for these kernels, so that what they cannot do is an error."""
    return _setting() == "1"


def why_not(device: torch.device) -> str | None:
    """None where the device can run these kernels and SOFTCLIP_CUDA does not turn them off, otherwise the reason in a
    sentence. Raises ValueError where SOFTCLIP_CUDA has a value without a meaning. Opens no library unless the device
    is a Hopper GPU, and those once; compiles nothing."""
    if _setting() == "0":
        return f"{VARIABLE}=0 turns them off"
    if device.type != "cuda":
        return f"they run on GPUs, not on {device}"
    if torch.version.hip:
        return "they run on NVIDIA's GPUs, and this torch is built for AMD's"
    index = _index(device)
    if index not in _reasons:
        _reasons[index] = _missing(index)
    return _reasons[index]


def versions() -> dict[str, str]:
    """Of driver and compiler, where `why_not` gave None for some device."""
    return {"driver": driver().version(), "NVRTC": "{}.{}".format(*nvrtc().version)}


def _missing(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability != CAPABILITY:
        return "they are for compute capability {}.{}, and this GPU has {}.{}".format(*CAPABILITY, *capability)
    try:
        driver()
        nvrtc()
        sources.texts()
    except Unavailable as error:
        return str(error)
    return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _setting() -> str:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}={value!r}; allowed: unset or '' (where they can run), '0' (never), '1' (always)")
    return value
