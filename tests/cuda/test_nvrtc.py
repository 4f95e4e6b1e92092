"""The CUDA kernels as NVRTC compiles them on a user's machine, by those of CUDA 12 and 13: the budgets that nvcc's code
has to keep too, the time that a training run waits for it, and the code that nvcc of the same version makes."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.backends import needs_triton
from helpers.hopper import (
    COMMON,
    Code,
    Specialisation,
    compiled_by,
    compiled_by_nvcc,
    disassembled,
    layout,
    spread,
    tool,
    wrong,
)

from softclip_kernels.backends.cuda import Unavailable, nvrtc, sources
from softclip_kernels.backends.cuda.kernels import OPTIONS

pytestmark = needs_triton

MAJORS = (12, 13)
FORWARD, _, PAIR, BACKWARD, _, MIRRORED = COMMON
NARROW = Specialisation("forward", 64, "fp16")
# Seconds of a processor, ten times the 2.4 to 2.8 s that a run's kernels were seen to take; it waits for them once.
MOST_SECONDS = 28.0
# What does the work. Of moves, addresses and predicates the two take a few more or fewer: the same front end, another
# way to its options.
WORK = {
    *("HGMMA", "WARPGROUP", "UTMALDG", "UTMASTG", "UTMAREDG", "SYNCS", "BAR", "USETMAXREG", "STSM", "LDS", "STS"),
    *("FFMA", "FADD", "FMUL", "MUFU", "SHFL", "F2FP", "LDG", "STG", "STL", "LDL", "BPT"),
}


@pytest.fixture(scope="module", params=MAJORS, ids="CUDA {}".format)
def compiler(request):
    """A real one."""
    try:
        return nvrtc.find(request.param)
    except Unavailable as error:
        pytest.skip(f"nothing was compiled: {error}")


@pytest.mark.parametrize("specialisation", spread([NARROW]))
def test_machine_code_keeps_its_budgets(compiler, specialisation, tmp_path):
    code = Code.of(disassembled(compiled_by(compiler, specialisation), tmp_path))
    assert list(wrong(code, specialisation)) == []
    assert on_the_stack(tmp_path / "read.cubin") == 0


def on_the_stack(cubin: Path) -> int:
    """Bytes of a thread's stack, where what is spilled lies."""
    cuobjdump = tool("cuobjdump")
    assert cuobjdump is not None
    command = [cuobjdump, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(number) for number in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))


def test_the_layout_is_that_of_the_launch(compiler):
    """As with nvcc (test_compiled.py)."""
    for specialisation in COMMON:
        file, _, macros, _ = specialisation.kernel
        headers = sources.headers() | {file: sources.text(file)}
        options = [*OPTIONS, *(f"--define-macro={name}={value}" for name, value in macros)]
        compiler.compile("layout.cu", layout(specialisation), headers, options)


def test_what_a_training_run_needs_is_compiled_in_seconds(compiler, record_property):
    """Forward and backward pass, alone and with self-distillation. The processor's time, which a busy
    machine does not change much, and a limit that only a kernel of another order passes."""
    start = time.process_time()
    for specialisation in (FORWARD, PAIR, BACKWARD, MIRRORED):
        compiled_by(compiler, specialisation)
    seconds = time.process_time() - start
    record_property("seconds", seconds)
    print(f"{seconds:.1f} s with NVRTC {compiler.version}")
    assert seconds < MOST_SECONDS


@pytest.mark.parametrize("specialisation", spread())
def test_the_code_is_nvccs(compiler, specialisation, tmp_path):
    """Of the same version: as many instructions of every kind that does the work."""
    nvcc = tool_version("nvcc")
    if nvcc != compiler.version:
        pytest.skip(f"nvcc is {nvcc}, and this NVRTC {compiler.version}: not compared")
    of_nvcc, _ = compiled_by_nvcc(specialisation, tmp_path, ROOT / "csrc" / "cuda")
    of_nvrtc = compiled_by(compiler, specialisation)
    own, other = (counted(disassembled(cubin, tmp_path)) for cubin in (of_nvrtc, of_nvcc))
    assert own == other and sum(own.values()) > 1000


def counted(code: str) -> dict[str, int]:
    operations = Code.of(code).operations()
    return {name: count for name, count in operations.items() if name.split(".")[0] in WORK}


def tool_version(name: str) -> tuple[int, int] | None:
    try:
        said = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else None
