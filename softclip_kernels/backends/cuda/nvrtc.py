"""The compiler that every CUDA build of torch brings: NVRTC, by ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import Unavailable

Program = c_void_p  # nvrtcProgram

# Every call that is made, with its parameters; all return an nvrtcResult.
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "nvrtcVersion": (POINTER(c_int), POINTER(c_int)),
    "nvrtcCreateProgram": (POINTER(Program), c_char_p, c_char_p, c_int, POINTER(c_char_p), POINTER(c_char_p)),
    "nvrtcCompileProgram": (Program, c_int, POINTER(c_char_p)),
    "nvrtcGetProgramLogSize": (Program, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (Program, c_void_p),
    "nvrtcGetCUBINSize": (Program, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (Program, c_void_p),
    "nvrtcDestroyProgram": (POINTER(Program),),
}


class CompileError(RuntimeError):
    """A call of NVRTC failed: the message names it, and has the compiler's log where there is one."""


class Nvrtc:
    """An opened NVRTC.

    path     the library, as it was opened
    version  (major, minor)
    """

    def __init__(self, path: str) -> None:
        """Raises OSError where the library cannot be opened, AttributeError where it is no NVRTC."""
        self.path = path
        self._library = ctypes.CDLL(path)
        for name, parameters in PROTOTYPES.items():
            getattr(self._library, name).argtypes = parameters
        self._library.nvrtcGetErrorString.argtypes = (c_int,)
        self._library.nvrtcGetErrorString.restype = c_char_p
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        # It opens its builtins by name alone, which finds what is open already.
        self._builtins = [ctypes.CDLL(str(each)) for each in _builtins(Path(path), self.version)]

    def compile(self, name: str, text: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        """The cubin of a text. `name` is what the log calls it; `headers` is what it may include, by name. The options
        name a real architecture, as in --gpu-architecture=sm_90a. Raises CompileError."""
        program = Program()
        count = len(headers)
        texts = (c_char_p * count)(*(header.encode() for header in headers.values()))
        names = (c_char_p * count)(*(header.encode() for header in headers))
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), count, texts, names
        )  # fmt: skip
        try:
            arguments = (c_char_p * len(options))(*(option.encode() for option in options))
            code = self._library.nvrtcCompileProgram(program, len(options), arguments)
            if code:
                log = self._output("nvrtcGetProgramLog", program).rstrip(b"\0\n").decode(errors="replace")
                raise CompileError(f"{self._failure('nvrtcCompileProgram', code)} in {name}:\n{log}")
            return self._output("nvrtcGetCUBIN", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _output(self, name: str, program: c_void_p) -> bytes:
        size = c_size_t()
        self._call(f"{name}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(name, program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CompileError(self._failure(name, code))

    def _failure(self, name: str, code: int) -> str:
        return f"{name} of {self.path} failed: {self._library.nvrtcGetErrorString(code).decode()}"


@cache
def nvrtc() -> Nvrtc:
    """That of this torch. Raises Unavailable where there is none."""
    if torch.version.cuda is None:
        raise Unavailable("this torch is built without CUDA, and brings no compiler (NVRTC)")
    return find(int(torch.version.cuda.partition(".")[0]))


def find(major: int) -> Nvrtc:
    """That of a CUDA of this major version: as NVIDIA's packages bring it, in torch's own folder, or the system's.
    Raises Unavailable where there is none."""
    refused = []
    for path in candidates(major):
        try:
            found = Nvrtc(path)
        except (OSError, AttributeError, CompileError) as error:
            refused.append(str(error))
            continue
        if found.version[0] == major:
            return found
        refused.append(f"{path} is of CUDA {found.version[0]}")
    package = "nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc"
    raise Unavailable(f"there is no compiler (NVRTC) of CUDA {major}; install {package} ({'; '.join(refused)})")


def candidates(major: int) -> Iterator[str]:
    """Where NVRTC may be, the likeliest first: paths of files that exist, and a name for the system's."""
    soname = f"libnvrtc.so.{major}"
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages.submodule_search_locations or ()) if packages is not None else ():
        for inner in ("cuda_nvrtc", f"cu{major}"):
            path = Path(folder, inner, "lib", soname)
            if path.is_file():
                yield str(path)
    for path in sorted(Path(torch.__file__).parent.joinpath("lib").glob(f"libnvrtc*.so.{major}")):
        if not path.name.startswith(("libnvrtc-builtins", "libnvrtc.alt")):
            yield str(path)
    yield soname


def _builtins(library: Path, version: tuple[int, int]) -> list[Path]:
    """Those beside the library."""
    if not library.is_absolute():
        return []
    found: list[Path] = []
    with contextlib.suppress(OSError):
        found = sorted(library.parent.glob(f"libnvrtc-builtins*.so.{version[0]}.{version[1]}"))
    return [path for path in found if ".alt." not in path.name]
