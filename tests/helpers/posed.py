"""Tensors of the CPU that pose as those of a Hopper GPU, with stand-ins for its driver, its compiler and Triton's
launches: what the CUDA kernels' dispatch does can be seen, and what it launches."""

from __future__ import annotations

import contextlib
import ctypes
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from softclip_kernels.backends.cuda import driver, kernels, launch, tensor_map
from softclip_kernels.problem import Problem, Source, TeacherOperand

from . import ROOT
from .cuda_driver import Launched, StandIn

GPU = torch.device("cuda", 0)
PROCESSORS, STREAM, CONTEXT = 132, 77, 1000
BYTES = {"TensorMap": 128, "int": 4, "pointer": 8}


def parameters(name: str) -> dict[str, str]:
    """Of a kernel, from its text: name to "TensorMap", "int" or "pointer"."""
    text = (ROOT / "csrc" / "cuda" / f"{name}.cu").read_text()
    listed = re.search(rf"\b{name}\((const __grid_constant__.*?)\) {{", text, re.DOTALL)
    assert listed is not None
    found = {}
    for parameter in listed[1].split(","):
        *of, called = parameter.replace("*", " * ").split()
        found[called] = "TensorMap" if "ptx::TensorMap" in of else "pointer" if "*" in of else of[-1]
    return found


KERNELS = {name: parameters(name) for name in ("softmax_forward", "softmax_forward_pair", "softmax_backward")}


class Compiler:
    """Stands for NVRTC: files and macros that it was asked for."""

    version = (12, 8)

    def __init__(self) -> None:
        self.compiled: list[tuple[str, dict[str, str]]] = []

    def compile(self, name: str, text: str, headers: Any, options: list[str]) -> bytes:
        macros = [option.removeprefix("--define-macro=").split("=", 1) for option in options if "macro" in option]
        self.compiled.append((name, {name: value for name, value in macros}))
        return b"cubin"


class Hopper(StandIn):
    """The GPU. triton: what Triton launched.

    run         called with the name and the arguments of every launch of a CUDA kernel, if it is there
    run_triton  likewise of Triton's
    """

    def __init__(self) -> None:
        super().__init__({name: [BYTES[of] for of in each.values()] for name, each in KERNELS.items()})
        self.run: Callable[[str, dict[str, Any]], object] = lambda name, arguments: None
        self.run_triton: Callable[[str, dict[str, Any]], object] = lambda name, arguments: None
        self.compiler = Compiler()
        self.triton: list[str] = []

    def _cuLaunchKernelEx(self, *arguments: Any) -> int:
        failed = super()._cuLaunchKernelEx(*arguments)
        if not failed:
            self.run(self.launched[-1].name, self.arguments(self.launched[-1]))
        return failed

    def _cuMemsetD8Async(self, address: int, value: int, count: int, stream: int | None) -> None:
        super()._cuMemsetD8Async(address, value, count, stream)
        ctypes.memset(address, value, count)

    def arguments(self, launched: Launched) -> dict[str, Any]:
        """By name: numbers, pointers, and of a tensor map what was encoded."""

        def value(of: str, content: bytes) -> Any:
            if of == "TensorMap":
                return self.encoded[content[0] - 1]
            return struct.unpack("<i" if of == "int" else "<Q", content)[0]

        kinds = KERNELS[launched.name].items()
        return {name: value(of, content) for (name, of), content in zip(kinds, launched.parameters, strict=True)}

    def note(self, launched: Any) -> None:
        from triton.runtime.jit import JITFunction

        from bench.aot.variants import KERNELS as TRITON

        name, _, given = launched
        self.triton.append(name)
        for module, called in TRITON.values():
            kernel = getattr(module, called)
            if called == name and isinstance(kernel, JITFunction):
                self.run_triton(name, dict(zip(kernel.arg_names, given, strict=True)))


@contextlib.contextmanager
def hopper(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hopper]:
    """A new process on such a GPU."""
    from bench import stubbed
    from softclip_kernels.backends.triton import cuda_call, sm90, tuning
    from softclip_kernels.backends.triton import launch as triton_launch

    found = Hopper()
    opened = driver.Driver(found)
    opened.call("cuCtxSetCurrent", CONTEXT)
    for module in (kernels, launch, tensor_map, cuda_call):
        patch.setattr(module, "driver", lambda: opened)
    patch.setattr(kernels, "nvrtc", lambda: found.compiler)
    new_process(patch)
    patch.setattr(sm90, "_failed", {})
    patch.setattr(tuning, "_measurements", {})
    patch.setattr(torch.version, "hip", None)
    patch.setattr(torch.Tensor, "device", property(lambda self: GPU))
    patch.setattr(torch.Tensor, "is_cuda", True)
    for name, value in {
        "get_device_capability": lambda device: (9, 0),
        "get_device_name": lambda device: "H200",
        "current_device": lambda: 0,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=STREAM),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda: None,
    }.items():
        patch.setattr(torch.cuda, name, value)
    for name in ("SOFTCLIP_CUDA", "SOFTCLIP_CANDIDATE", "SOFTCLIP_AUTOTUNE", "SOFTCLIP_REPLAY", "SOFTCLIP_GPU_MIB"):
        patch.delenv(name, raising=False)
    patch.setenv("XDG_CACHE_HOME", str(cache))
    triton_launch._case.cache_clear()
    with stubbed.gpu(found.note), _OnTheCpu():
        yield found
    triton_launch._case.cache_clear()


class _OnTheCpu(TorchFunctionMode):
    """What is allocated on the GPU lies on the CPU."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        return function(*arguments, **(options | {"device": "cpu"} if options.get("device") == GPU else options))


def new_process(patch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded or chosen."""
    from softclip_kernels.backends.triton import tuning

    for name in ("_modules", "_functions", "_reasons"):
        patch.setattr(kernels, name, {})
    patch.setattr(tuning, "_chosen", {})


def embeddings(n: int, d: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(n, d, dtype=dtype)


def problem(
    n: int = 300,
    d: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    teachers: tuple[TeacherOperand, ...] = (),
    **others: Any,
) -> Problem:
    x, y = embeddings(n, d, dtype), embeddings(n, d, dtype)
    each = torch.arange(n)
    return Problem(x, y, torch.tensor(10.0), each, positive_row=each, teachers=teachers, **others)


def own_teacher(n: int = 300, d: int = 64, dtype: torch.dtype = torch.bfloat16, **others: Any) -> TeacherOperand:
    operands = embeddings(n, d, dtype), embeddings(n, d, dtype)
    return TeacherOperand(Source.EMBEDDINGS, torch.tensor(5.0), *operands, **others)


SWAPPED, SCALED = TeacherOperand(Source.TRANSPOSED), TeacherOperand(Source.TRANSPOSED, torch.tensor(2.0))
OWN_LOGITS = TeacherOperand(Source.LOGITS, torch.tensor(2.0))


def passes_of(of: Problem) -> Any:
    from softclip_kernels.backends.triton import passes

    return passes.passes(of)[0]
