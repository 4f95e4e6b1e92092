"""How the distributions and the CPU extension in them come to be: nothing is missing from either distribution, and no
compiler or an older one costs the extension or a level of it, never the installation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

# What is not the repository's: built, cached or downloaded.
IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.so", "*.pyd", "*.egg-info", "build",
    "dist", "runs",
)  # fmt: skip
COMPILER = os.environ.get("CXX", "c++")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


@pytest.fixture
def sources(tmp_path):
    """A copy to build in: nothing appears in the working tree."""
    return shutil.copytree(ROOT, tmp_path / "sources", ignore=IGNORED)


@pytest.fixture
def unpacked(sources, tmp_path):
    """The source distribution made of the copy, and unpacked elsewhere."""
    archive, _ = build(sources, "sdist")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.glob("softclip_kernels-*")
    return tree


def build(sources, kind, **environment):
    """The distribution's path and the lines that the build printed of ours."""
    code = f"from setuptools import build_meta; print('built', build_meta.build_{kind}('dist'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=sources,
        env={**os.environ, "SOFTCLIP_CPU_FLAGS": "-O0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = run.stdout.splitlines()
    (name,) = [line.removeprefix("built ") for line in lines if line.startswith("built ")]
    return sources / "dist" / name, [line for line in lines if line.startswith("softclip_kernels: ")]


def modules(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def kernels(tree):
    """The CUDA kernels' text."""
    return {path.name for path in (tree / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cuh")}


def levels_in(wheel, directory):
    """What the wheel's extension offers on this machine; None where it has none."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    libraries = [path for path in (directory / "softclip_kernels").glob("_cpu*") if path.suffix in (".so", ".pyd")]
    if not libraries:
        return None
    code = "import json, _cpu; print(json.dumps(_cpu.levels()))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=libraries[0].parent, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def test_the_source_distribution_holds_all_that_its_tests_need(sources, unpacked):
    """Every file of Python, and whatever else the tests read while they are collected; none is found elsewhere."""
    assert modules(sources) == modules(unpacked)
    assert kernels(sources) == kernels(unpacked) >= {"ptx.cuh"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "tests/backends/test_cpu_build.py::test_the_source_distribution" in run.stdout


def test_the_wheel_holds_every_package(sources):
    """A sub-package that is new as well, at any depth, and the mark of typed packages. Of the trainer see
    tests/trainer/test_package.py."""
    for name in ("added", "added/below"):
        (sources / "softclip_kernels" / name).mkdir()
        (sources / "softclip_kernels" / name / "__init__.py").touch()
    for name in ("added.cu", "added.cuh"):
        (sources / "csrc" / "cuda" / name).touch()
    wheel, _ = build(sources, "wheel", CXX="/nonexistent/c++")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("softclip_kernels/")}
    expected = {f"softclip_kernels/{name}" for name in modules(sources / "softclip_kernels")}
    expected |= {f"softclip_kernels/backends/cuda/csrc/{name}" for name in kernels(sources)}
    assert names == expected | {"softclip_kernels/py.typed"}


def test_an_installed_package_reads_the_kernels_that_it_brings(sources, tmp_path):
    """The same text as the source tree's, away from it."""
    wheel, _ = build(sources, "wheel", CXX="/nonexistent/c++")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = "import json; from softclip_kernels.backends.cuda import sources; print(json.dumps(sources.texts()))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    texts = json.loads(run.stdout)
    assert texts.keys() == kernels(sources) and "ptx.cuh" in texts
    assert all(texts[name] == (sources / "csrc" / "cuda" / name).read_text() for name in texts)


@needs_compiler
def test_an_unpacked_source_distribution_builds(unpacked, tmp_path):
    """What is unpacked from an sdist builds a wheel with the extension, and no other file is needed. The objects of the
    levels have no symbol that the linker could merge with another level's, and nothing that runs before a level is
    chosen: an instruction that the CPU lacks can only be reached through the level's table."""
    assert (unpacked / "NOTICE").exists() and (unpacked / "csrc" / "sanitize.sh").exists()
    wheel, lines = build(unpacked, "wheel")
    assert not lines
    assert levels_in(wheel, tmp_path / "wheel")[-1] == "portable"
    if shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("no nm: the objects' symbols were not looked at")
    objects = list(unpacked.glob("build/**/level_*.o"))
    assert objects
    for one in objects:
        symbols = subprocess.run(["nm", one], capture_output=True, text=True, check=True).stdout.splitlines()
        kinds = {line.split()[-2]: line for line in symbols}
        assert not kinds.keys() & set("uVvWw"), kinds
        assert not any("_GLOBAL__sub_I" in line or "__cxa_" in line for line in symbols)


@pytest.mark.parametrize("compiler", ("/nonexistent/c++", "not executable", "false"))
def test_no_compiler_costs_the_extension_alone(sources, tmp_path, compiler):
    if compiler == "not executable":
        compiler = str(tmp_path / "c++")
        Path(compiler).write_text("")
    wheel, lines = build(sources, "wheel", CXX=compiler)
    assert levels_in(wheel, tmp_path / "wheel") is None
    (line,) = lines
    assert "the CPU kernels were not built" in line and ("no C++ compiler" in line or "cpu.log" in line)


@needs_compiler
def test_an_older_compiler_costs_a_level(sources, tmp_path):
    """One that does not know avx512bf16: one line, the other levels work, and its own words are in the log."""
    old = tmp_path / "old-c++"
    refusal = "error: unrecognized command-line option '-mavx512bf16'"
    old.write_text(
        f"""#!/bin/sh
for argument; do
  if [ "$argument" = -mavx512bf16 ]; then echo "{refusal}" >&2; exit 1; fi
done
exec {COMPILER} "$@"
"""
    )
    old.chmod(0o755)
    wheel, lines = build(sources, "wheel", CXX=str(old))
    levels = levels_in(wheel, tmp_path / "wheel")
    assert levels[-1] == "portable" and "avx512bf16" not in levels
    if lines:  # on x86
        (line,) = lines
        assert "lack the level avx512bf16" in line and refusal in line
        assert refusal in (sources / "build" / "cpu.log").read_text()
