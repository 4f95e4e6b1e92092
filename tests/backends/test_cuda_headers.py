"""Structures and numbers of the loader against every cuda.h of this machine, as a C compiler reads them."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from softclip_kernels.backends.cuda import driver, tensor_map
from softclip_kernels.backends.cuda.driver import LaunchAttribute, LaunchAttributeValue, LaunchConfig

COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)

WARNINGS = ("-Wall", "-Wconversion", "-Wno-sign-conversion", "-Wno-unused-function", "-Werror")

# In C; the loader's.
FACTS = {
    "CUDA_ERROR_INVALID_VALUE": driver.INVALID_VALUE,
    "CUDA_ERROR_INVALID_CONTEXT": driver.INVALID_CONTEXT,
    "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": driver.MAX_DYNAMIC_SHARED_SIZE_BYTES,
    "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION": driver.CLUSTER_DIMENSION,
    "CU_TENSOR_MAP_DATA_TYPE_FLOAT16": tensor_map.DTYPES[torch.float16],
    "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16": tensor_map.DTYPES[torch.bfloat16],
    "CU_TENSOR_MAP_INTERLEAVE_NONE": tensor_map.INTERLEAVE_NONE,
    "CU_TENSOR_MAP_SWIZZLE_128B": tensor_map.SWIZZLE_128B,
    "CU_TENSOR_MAP_L2_PROMOTION_L2_256B": tensor_map.L2_PROMOTION_256B,
    "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE": tensor_map.FILL_ZERO,
    "sizeof(CUtensorMap)": tensor_map.TensorMap.BYTES,
    "sizeof(CUlaunchAttributeValue)": ctypes.sizeof(LaunchAttributeValue),
    "offsetof(CUlaunchAttributeValue, clusterDim.x)": LaunchAttributeValue.cluster.offset,
    "offsetof(CUlaunchAttributeValue, clusterDim.z)": LaunchAttributeValue.cluster.offset + 8,
    "sizeof(CUlaunchAttribute)": ctypes.sizeof(LaunchAttribute),
    "offsetof(CUlaunchAttribute, id)": LaunchAttribute.id.offset,
    "offsetof(CUlaunchAttribute, value)": LaunchAttribute.value.offset,
    "sizeof(CUlaunchConfig)": ctypes.sizeof(LaunchConfig),
    **{
        f"offsetof(CUlaunchConfig, {theirs})": getattr(LaunchConfig, ours).offset
        for theirs, ours in (
            *((f"gridDim{axis.upper()}", f"grid_{axis}") for axis in "xyz"),
            *((f"blockDim{axis.upper()}", f"block_{axis}") for axis in "xyz"),
            ("sharedMemBytes", "shared_bytes"),
            ("hStream", "stream"),
            ("attrs", "attributes"),
            ("numAttrs", "attribute_count"),
        )
    },
}

IN_C = {
    ctypes.c_int: "int",
    ctypes.c_uint: "unsigned int",
    ctypes.c_ubyte: "unsigned char",
    ctypes.c_uint64: "uint64_t",
    ctypes.c_void_p: "void *",
    ctypes.c_char_p: "const char *",
    ctypes.POINTER(ctypes.c_void_p): "void *",  # to a handle, of which the header has many types
}


def in_c(kind):
    return IN_C.get(kind) or f"{in_c(kind._type_)} *"


def headers():
    """Folders with a cuda.h of NVIDIA's: beside nvcc, and the one that triton brings."""
    found = [Path(os.environ[name], "include") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        found.append(Path(nvcc).resolve().parents[1] / "include")
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        found.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return list(dict.fromkeys(folder for folder in found if (folder / "cuda.h").is_file()))


def compiled(folder, text, tmp_path):
    """What the program prints."""
    source, program = tmp_path / "facts.c", tmp_path / "facts"
    source.write_text(f"#include <cuda.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n{text}")
    command = [COMPILER, "-std=c11", "-O1", *WARNINGS, "-I", str(folder), str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout


FOLDERS = headers() or [None]
NAMES = [folder.parent.name if folder else "none" for folder in FOLDERS]


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_structures_and_numbers_are_those_of_the_header(folder, tmp_path):
    if folder is None or COMPILER is None:
        pytest.skip("no cuda.h (it comes with nvcc and with triton) or no C compiler: not compared")
    lines = "".join(f'  printf("%lld\\n", (long long)({fact}));\n' for fact in FACTS)
    output = compiled(folder, f"int main(void) {{\n{lines}  return 0;\n}}\n", tmp_path)
    assert dict(zip(FACTS, map(int, output.split()), strict=True)) == FACTS


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_calls_are_declared_as_in_the_header(folder, tmp_path):
    """As many parameters of the same kinds, by names that the header does not redirect to newer versions."""
    if folder is None or COMPILER is None:
        pytest.skip("no cuda.h (it comes with nvcc and with triton) or no C compiler: not compared")
    lines = ["#define NAME_(name) #name", "#define NAME(name) NAME_(name)"]
    for name, parameters in driver.PROTOTYPES.items():
        kinds = list(map(in_c, parameters))
        declared = ", ".join(f"{kind} a{place}" for place, kind in enumerate(kinds))
        given = ", ".join(f"a{place}" for place in range(len(kinds)))
        lines += [f"static inline CUresult test_{name}({declared}) {{ return {name}({given}); }}"]
    lines += ["int main(void) {", *(f"  puts(NAME({name}));" for name in driver.PROTOTYPES), "  return 0;", "}", ""]
    assert compiled(folder, "\n".join(lines), tmp_path).split() == list(driver.PROTOTYPES)
