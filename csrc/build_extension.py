"""Builds softclip_kernels._native with the system's C++ compiler: every instruction-set level in its own file, with
its own flags, chosen at run time. A machine without a compiler gets the package without the extension and one line."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent
COMMON = ("bindings", "forward", "backward", "plan", "schedule", "team")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
LEVELS = {"avx512bf16": (*AVX512, "-mavx512bf16"), "avx512": AVX512, "avx2": AVX2}
FLAGS = ("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread", "-Wall", "-Wextra")
# gcc's own intrinsics headers start results from deliberately uninitialised registers.
LEVEL_FLAGS = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")

EXTENSION = Extension("softclip_kernels._native", sources=[])


class BuildNative(build_ext):
    """`SOFTCLIP_NATIVE_FLAGS` adds flags to every compilation and to the link (sanitizers)."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        try:
            _build(target, Path(self.build_temp).resolve() / "native")
        except FileNotFoundError as error:
            _report(f"no C++ compiler ({error.filename!r} was not found)")
        except ImportError as error:
            _report(f"{error}; pip install pybind11")
        except subprocess.CalledProcessError as error:
            _report(f"the C++ compiler failed:\n{error.stderr.strip()}")

    def copy_extensions_to_source(self) -> None:
        """An editable install looks for the library in the source tree; it may be missing."""
        if Path(self.build_lib, *EXTENSION.name.split(".")[:-1]).exists():
            target = Path(self.get_ext_filename(EXTENSION.name))
            built = Path(self.build_lib) / target
            if built.exists():
                self.copy_file(str(built), str(CSRC.parent / target))


def _report(reason: str) -> None:
    print(f"softclip_kernels: the native CPU kernels were not built: {reason}", flush=True)


def _build(target: Path, objects: Path) -> None:
    import pybind11

    compiler = shlex.split(os.environ.get("CXX", "c++"))
    extra = shlex.split(os.environ.get("SOFTCLIP_NATIVE_FLAGS", ""))
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    include = ["-I", sysconfig.get_paths()["include"], "-I", pybind11.get_include()]
    units = {name: [*include, f"-DSOFTCLIP_X86={int(x86)}"] for name in COMMON}
    units["level_portable"] = list(LEVEL_FLAGS)
    if x86:
        units |= {f"level_{name}": [*flags, *LEVEL_FLAGS] for name, flags in LEVELS.items()}
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def compile_unit(name: str) -> str:
        output = str(objects / f"{name}.o")
        _run([*compiler, *FLAGS, *extra, *units[name], "-c", str(CSRC / f"{name}.cpp"), "-o", output])
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = list(pool.map(compile_unit, units))
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    _run([*compiler, *shared, "-pthread", *extra, *outputs, "-o", str(target)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
