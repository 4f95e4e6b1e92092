"""Builds softclip_kernels._cpu with the system's C++ compiler: every instruction-set level in its own file, with
its own flags, chosen at run time. A level that the compiler does not know is left out, and a machine without a compiler
gets the package without the extension. Either is said in one line; what the compiler said goes to build/cpu.log."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent
LOG = CSRC.parent / "build" / "cpu.log"
COMMON = ("bindings", "forward", "backward", "plan", "schedule", "team", "level_portable")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
LEVELS = {"avx512bf16": (*AVX512, "-mavx512bf16"), "avx512": AVX512, "avx2": AVX2}
FLAGS = ("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread", "-Wall", "-Wextra")
# gcc's own intrinsics headers start results from deliberately uninitialised registers.
LEVEL_FLAGS = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")

EXTENSION = Extension("softclip_kernels._cpu", sources=[])


class CannotBuildError(Exception):
    """The message is one line; `output` is everything the compiler said."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class RefusedError(CannotBuildError):
    """The compiler ran and failed."""


class BuildCpu(build_ext):
    """`SOFTCLIP_CPU_FLAGS` adds flags to every compilation and to the link (sanitizers)."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        try:
            _build(target, Path(self.build_temp).resolve() / "cpu")
        except (CannotBuildError, ImportError) as error:
            _report(f"the CPU kernels were not built: {error}{_logged(getattr(error, 'output', ''))}")

    def copy_extensions_to_source(self) -> None:
        """An editable install looks for the library in the source tree; it may be missing."""
        if Path(self.build_lib, *EXTENSION.name.split(".")[:-1]).exists():
            target = Path(self.get_ext_filename(EXTENSION.name))
            built = Path(self.build_lib) / target
            if built.exists():
                self.copy_file(str(built), str(CSRC.parent / target))


def _report(line: str) -> None:
    print(f"softclip_kernels: {line}", flush=True)


def _logged(output: str) -> str:
    """Where `output` was written to, for the end of a message; nothing where there is none or it could not be."""
    if not output:
        return ""
    try:
        LOG.parent.mkdir(exist_ok=True)
        with LOG.open("a") as log:
            log.write(output)
    except OSError:
        return ""
    return f"; all it said is in {LOG}"


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def _build(target: Path, objects: Path) -> None:
    import pybind11

    extra = shlex.split(os.environ.get("SOFTCLIP_CPU_FLAGS", ""))
    levels = LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {}
    units: dict[str, Sequence[str]] = dict.fromkeys(COMMON, ())
    units["bindings"] = ("-I", sysconfig.get_paths()["include"], "-I", pybind11.get_include())
    units["level_portable"] = LEVEL_FLAGS
    units |= {f"level_{name}": (*flags, *LEVEL_FLAGS) for name, flags in levels.items()}
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        LOG.unlink()

    def compile_unit(name: str, flags: Sequence[str]) -> str:
        output = str(objects / f"{name}.o")
        _run(f"{name}.cpp", [*_compiler(), *FLAGS, *extra, *flags, "-c", str(CSRC / f"{name}.cpp"), "-o", output])
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = {name: pool.submit(compile_unit, name, flags) for name, flags in units.items()}
    outputs = [results[name].result() for name in COMMON]
    built = []
    for name in levels:
        try:
            outputs.append(results[f"level_{name}"].result())
            built.append(name)
        except RefusedError as error:
            _report(f"the CPU kernels lack the level {name}: {error}{_logged(error.output)}")
    outputs.append(compile_unit("levels", [f"-DSOFTCLIP_HAS_{name.upper()}" for name in built]))
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    _run("linking", [*_compiler(), *shared, "-pthread", *extra, *outputs, "-o", str(target)])


def _run(task: str, command: list[str]) -> None:
    try:
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:  # not found, not executable, not a program
        raise CannotBuildError(f"there is no C++ compiler ({command[0]!r}: {error.strerror})") from error
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()] or ["it said nothing"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise RefusedError(f"the C++ compiler failed ({task}: {reason})", f"== {task}\n{result.stderr}\n")
