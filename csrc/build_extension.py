"""Builds softclip_kernels._cpu with the system's C++ compiler: every instruction-set level in its own file, with
its own flags, chosen at run time. A level that the compiler does not know is left out, and a machine without a compiler
gets the package without the extension. Either is said in one line; what the compiler said goes to build/cpu.log.

pyproject.toml names `BuildCpu` as the command build_ext, setup.py the extension."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent
LOG = CSRC.parent / "build" / "cpu.log"
CPU = CSRC / "cpu"
PYTHON = ("bindings", "tensors")  # the files that see Python
COMMON = (
    *PYTHON, "softmax_forward", "softmax_backward", "positives", "linear_form", "traversal", "workspace", "panels",
    "plan", "schedule", "team", "openmp", "stopwatch", "memory",
)  # fmt: skip
FLAGS = ("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread", "-Wall", "-Wextra")
# gcc's own intrinsics headers start results from deliberately uninitialized registers.
LEVEL_FLAGS = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")


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
        for extension in self.extensions:
            target = Path(self.get_ext_filename(extension.name))
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


class Level(NamedTuple):
    """A line of levels.def."""

    name: str
    line: str
    flags: tuple[str, ...]


def _levels() -> list[Level]:
    """Those of this machine's architecture, best first."""
    machine = platform.machine().lower()
    architectures = ("any", {"amd64": "x86_64"}.get(machine, machine))
    lines = re.findall(r"^(LEVEL\((\w+), (\w+), (.*)\))$", (CPU / "levels.def").read_text(), re.MULTILINE)
    return [
        Level(name, line, tuple(f"-m{feature}" for feature in re.findall(r"HAS\((\w+)\)", features)))
        for line, name, architecture, features in lines
        if architecture in architectures
    ]


def _build(target: Path, objects: Path) -> None:
    import pybind11

    extra = shlex.split(os.environ.get("SOFTCLIP_CPU_FLAGS", ""))
    levels = _levels()
    units: dict[str, Sequence[str]] = dict.fromkeys(COMMON, ())
    units |= dict.fromkeys(PYTHON, ("-I", sysconfig.get_paths()["include"], "-I", pybind11.get_include()))
    units |= {f"level_{level.name}": (*level.flags, *LEVEL_FLAGS) for level in levels}
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        LOG.unlink()

    def compile_unit(name: str, flags: Sequence[str]) -> str:
        output = str(objects / f"{name}.o")
        _run(f"{name}.cpp", [*_compiler(), *FLAGS, *extra, *flags, "-c", str(CPU / f"{name}.cpp"), "-o", output])
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = {name: pool.submit(compile_unit, name, flags) for name, flags in units.items()}
    outputs = [results[name].result() for name in COMMON]
    compiled = []
    for level in levels:
        try:
            outputs.append(results[f"level_{level.name}"].result())
            compiled.append(level.line)
        except RefusedError as error:
            if not level.flags:  # without the level that every machine can run there is nothing
                raise
            _report(f"the CPU kernels lack the level {level.name}: {error}{_logged(error.output)}")
    (objects / "compiled_levels.def").write_text("".join(f"{line}\n" for line in compiled))
    outputs.append(compile_unit("levels", ("-I", str(objects))))
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
