"""Triton's launches without a GPU: everything up to the driver is real, and nothing is compiled or run. What the host
does can be counted and timed so; what a loss returns is not defined."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from softclip_kernels.backends.triton import TritonBackend, call, launch, replay

Launch = tuple[str, tuple[int, ...], tuple[Any, ...]]  # a kernel's name, its grid, its arguments
Note = Callable[[Launch], object]


class Driver:
    """An H100 that holds the CPU's tensors."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Kernel(CompiledKernel):
    """What compiling leaves: a launch only calls `note`, if there is one."""

    run: Any = None  # a property of compiled kernels

    def __init__(self, name: str, note: Note | None) -> None:
        self.name = name
        self.function = self.packed_metadata = None
        self.run = _nothing if note is None else lambda *arguments: note((name, arguments[:3], arguments[9:]))

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *arguments: Any) -> None:
        return None


def _nothing(*arguments: Any) -> None:
    pass


@contextlib.contextmanager
def gpu(
    note: Note | None,
    compiled: Callable[[JITFunction, dict[str, str]], object] = lambda kernel, signature: None,
) -> Iterator[None]:
    """Within, the Triton backend takes the CPU's tensors of any dtype for an H100's. Every launch is told to `note`,
    every kernel that would be compiled, with the types of its arguments, to `compiled`. Products of torch's are left
    out."""

    kernels: set[JITFunction] = set()

    def compile(self: JITFunction, key: str, signature: dict[str, str], *_: Any, **options: Any) -> Kernel:
        kernels.add(self)
        compiled(self, signature)
        return self.device_caches[0][0].setdefault(key, Kernel(self.__name__, note))

    before, driver._active = driver._active, Driver()
    try:
        with (  # functions, because a mock takes longer than what is timed
            mock.patch.object(JITFunction, "_do_compile", compile),
            mock.patch.object(launch, "architecture", lambda device: "sm_90"),  # noqa: PT008
            mock.patch.object(launch, "processors", lambda device: 132),  # noqa: PT008
            mock.patch.object(launch, "add_product", lambda *_: None),  # noqa: PT008
            mock.patch.object(call, "_compiled", {}),
            mock.patch.object(replay, "_recordings", {}),
            mock.patch.object(TritonBackend, "why_not", lambda self, problem: None),  # noqa: PT008
        ):
            yield
    finally:
        driver._active = before
        for kernel in kernels:  # that nobody takes a stub for what a GPU compiled
            kernel.device_caches.clear()
