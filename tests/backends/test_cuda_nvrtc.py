"""The compiler of the CUDA kernels: where it is found, and what the real ones of CUDA 12 and 13 make of a text."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from softclip_kernels.backends.cuda import Unavailable, nvrtc, sources
from softclip_kernels.backends.cuda.kernels import OPTIONS
from softclip_kernels.backends.cuda.nvrtc import CompileError, Nvrtc

MAJORS = (12, 13)

# An instruction that sm_90a has and sm_90 has not, a header, a macro, and a matrix by value.
TEXT = """
#include "doubled.cuh"
struct alignas(64) Map { unsigned long long words[16]; };
extern "C" __global__ void tiny(const __grid_constant__ Map map, float* out, int count) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  if (threadIdx.x < count) out[threadIdx.x] = doubled(WEIGHT) + map.words[0];
}
"""
HEADERS = {"doubled.cuh": "__device__ inline float doubled(float value) { return 2 * value; }\n"}


@pytest.fixture(params=MAJORS, ids="CUDA {}".format)
def compiler(request):
    """A real one."""
    try:
        return nvrtc.find(request.param)
    except Unavailable as error:
        pytest.skip(f"nothing was compiled: {error}")


def compiled(compiler, *options):
    return compiler.compile("tiny.cu", TEXT, HEADERS, (*options, "-DWEIGHT=3"))


def test_a_text_becomes_machine_code_for_hopper(compiler):
    cubin = compiled(compiler, *OPTIONS)
    assert cubin[:4] == b"\x7fELF" and b"tiny" in cubin
    assert int.from_bytes(cubin[18:20], "little") == 190  # EM_CUDA
    assert compiled(compiler, *OPTIONS) == cubin
    assert compiler.compile("tiny.cu", TEXT, HEADERS, (*OPTIONS, "-DWEIGHT=4")) != cubin
    with pytest.raises(CompileError, match=r"wgmma\.fence.*sm_90"):
        compiled(compiler, "--gpu-architecture=sm_90")


def test_the_machine_code_is_for_sm_90a_as_its_disassembler_reads_it(compiler, tmp_path):
    disassembler = nvdisasm()
    if disassembler is None:
        pytest.skip("no nvdisasm (it comes with nvcc and with triton): the machine code was not read")
    (tmp_path / "cubin").write_bytes(compiled(compiler, *OPTIONS))
    run = subprocess.run([disassembler, tmp_path / "cubin"], capture_output=True, text=True, check=True)
    assert re.search(r"\.target\s+sm_90a\b|EF_CUDA_ACCELERATORS EF_CUDA_SM90\b", run.stdout)
    assert ".text.tiny" in run.stdout


def nvdisasm():
    try:
        import triton
    except ImportError:
        return shutil.which("nvdisasm")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else shutil.which("nvdisasm")


def test_the_kernels_own_header_needs_none_of_cudas(compiler):
    cubin = compiler.compile("one.cu", '#include "ptx.cuh"\n', sources.headers(), OPTIONS)
    assert cubin[:4] == b"\x7fELF"


def test_an_error_has_the_compilers_log(compiler):
    with pytest.raises(
        CompileError,
        match=r'(?s)nvrtcCompileProgram of .*NVRTC_ERROR_COMPILATION in wrong\.cu:.*"misspelt" is undefined',
    ):
        compiler.compile("wrong.cu", "__global__ void f() { misspelt(); }", {}, OPTIONS)
    with pytest.raises(CompileError, match=r"(?s)tiny\.cu.*doubled\.cuh"):
        compiler.compile("tiny.cu", TEXT, {}, OPTIONS)
    with pytest.raises(CompileError, match=r"nvrtcCompileProgram of .*NVRTC_ERROR_INVALID_OPTION"):
        compiled(compiler, "--no-such-option")


def test_the_builtins_are_those_of_the_same_folder(compiler, tmp_path):
    """In a folder that the dynamic linker does not search. Where they are missing the compiler cannot work."""
    folder = Path(compiler.path).parent
    version = "{}.{}".format(*compiler.version)
    elsewhere = tmp_path / "lib"
    elsewhere.mkdir()
    for path in (Path(compiler.path), *folder.glob(f"libnvrtc-builtins*.so.{version}")):
        (elsewhere / path.name).symlink_to(path)
    code = f"""
import sys
from softclip_kernels.backends.cuda.nvrtc import Nvrtc
Nvrtc({str(elsewhere / Path(compiler.path).name)!r}).compile("a.cu", "__global__ void a() {{}}", {{}}, {OPTIONS!r})
print([line.split()[-1] for line in open("/proc/self/maps") if "builtins" in line][0])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()) == (folder / f"libnvrtc-builtins.so.{version}").resolve()


def test_of_another_major_version_is_none(compiler, monkeypatch):
    """A CUDA 12 torch does not get the compiler of CUDA 13, whose code its driver may not load."""
    other = sum(MAJORS) - compiler.version[0]
    monkeypatch.setattr(nvrtc, "candidates", lambda major: [compiler.path])
    with pytest.raises(Unavailable, match=f"no compiler .* of CUDA {other};.* is of CUDA {compiler.version[0]}"):
        nvrtc.find(other)


# Where it is looked for.


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Makes empty files where packages and torch would bring libraries; nothing else is installed."""

    def make(*files):
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return [str(tmp_path / file) for file in files]

    (tmp_path / "nvidia").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    return make


def test_packages_come_before_torchs_folder_and_the_system(installed):
    twelve = installed(
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "torch/lib/libnvrtc-0a1b2c3d.so.12", "torch/lib/libnvrtc.so.12"
    )
    thirteen = installed("nvidia/cu13/lib/libnvrtc.so.13")
    installed(
        "torch/lib/libnvrtc-builtins.so.12", "torch/lib/libnvrtc.alt.so.12", "nvidia/cu13/lib/libnvrtc-builtins.so.13.0"
    )
    assert list(nvrtc.candidates(12)) == [*twelve, "libnvrtc.so.12"]
    assert list(nvrtc.candidates(13)) == [*thirteen, "libnvrtc.so.13"]


def test_no_compiler_is_a_reason_that_names_the_package(installed, monkeypatch):
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", refuse)
    with pytest.raises(
        Unavailable, match=r"no compiler \(NVRTC\) of CUDA 12; install nvidia-cuda-nvrtc-cu12 \(.*so\.12"
    ):
        nvrtc.find(12)
    (damaged,) = installed("nvidia/cu13/lib/libnvrtc.so.13")
    with pytest.raises(
        Unavailable, match=rf"install nvidia-cuda-nvrtc \({damaged}: refused; libnvrtc\.so\.13: refused\)"
    ):
        nvrtc.find(13)


def refuse(path):
    raise OSError(f"{path}: refused")


def test_a_damaged_library_gives_way_to_the_next(installed, monkeypatch):
    installed("nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "torch/lib/libnvrtc.so.12")

    class Opened(Nvrtc):
        def __init__(self, path):
            if "cuda_nvrtc" in path:
                Nvrtc.__init__(self, path)  # of an empty file
            self.path, self.version = path, (12, 8)

    monkeypatch.setattr(nvrtc, "Nvrtc", Opened)
    assert nvrtc.find(12).path.endswith("torch/lib/libnvrtc.so.12")


def test_the_compiler_is_that_of_torchs_cuda(monkeypatch):
    asked = []
    monkeypatch.setattr(nvrtc, "find", asked.append)
    for version in ("12.8", "13.0"):
        nvrtc.nvrtc.cache_clear()
        monkeypatch.setattr(torch.version, "cuda", version)
        nvrtc.nvrtc()
    nvrtc.nvrtc.cache_clear()
    assert asked == [12, 13]
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(Unavailable, match="this torch is built without CUDA"):
        nvrtc.nvrtc()
