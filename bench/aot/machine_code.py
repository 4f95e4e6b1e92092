"""What a compiled kernel uses: registers, spills, shared memory, tensor-core instructions and exponentials, counted in
the machine code and in Triton's intermediate code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from softclip_kernels.backends.triton import persistent
from softclip_kernels.backends.triton.shapes import TMA

from .variants import SHARED_LIMIT, Variant, compile_variant, variants


def inspect(variant: Variant, architecture: str) -> dict[str, Any]:
    """What one variant compiles to. registers and spilled (bytes, stack included) are a thread's, shared bytes a
    program's, of which `together` are to share a multiprocessor; exponentials_issued counts machine instructions a
    thread, over its `entries`; serialized, on sm_90, tensor instructions that wait for the one before; shuffles between
    threads and tile_loads (TMA) are counted in nvidia's code alone. From the intermediate code: matmuls; exponentials
    of whole tiles, the fewest that a program takes, the most, and all in the code; and narrow_offsets, the addresses
    that rest on a product in 32 bits."""
    compiled = compile_variant(variant, architecture)
    nvidia = architecture.startswith("sm_")
    s = variant.shape
    intermediate = compiled.asm["ttir"]
    return {
        "variant": variant.name,
        "kernel": variant.kernel,
        "mode": variant.mode,
        "way": variant.shape.way,
        "tied": variant.tied,
        "plain": variant.plain and "fp32" not in (variant.dtype, variant.teacher_dtype),
        "dtype": variant.dtype,
        "three_products": variant.three_products,
        "architecture": architecture,
        "triton": triton.__version__,
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[architecture],
        "together": persistent.together(s) if s.way == TMA else 1,
        "entries": s.block_m * s.block_n // ((32 if nvidia else 64) * s.warps),
        **(_nvidia(compiled.asm["cubin"]) if nvidia else _amd(compiled.asm["amdgcn"])),
        "matmuls": len(re.findall(r"= tt\.dot ", intermediate)),
        "exponentials": exponentials(intermediate, f"tensor<{s.block_m}x{s.block_n}xf32"),
        "narrow_offsets": narrow_offsets(intermediate),
    }


def exponentials(intermediate: str, tile: str) -> list[int]:
    """How many exponentials of whole tiles a program takes: the fewest and the most, over the branches that it may go,
    and all that stand in the code."""
    fewest, most, opened = [0], [0], []
    for line in intermediate.splitlines():
        if "= math.exp2 " in line and tile in line:
            fewest[-1] += 1
            most[-1] += 1
        if re.search(r"\bscf\.if\b", line):
            opened.append("if")
            fewest += [0]
            most += [0]
        elif line.strip().startswith("} else {"):
            opened[-1] = "else"
            fewest += [0]
            most += [0]
        elif line.rstrip().endswith("{"):
            opened.append("other")
        if re.match(r"\s*\}(?! else)", line) and opened:
            kind = opened.pop()
            if kind == "if":
                fewest.pop()
                most[-2:] = [most[-2] + most[-1]]
            elif kind == "else":
                fewest[-3:] = [fewest[-3] + min(fewest[-2:])]
                most[-3:] = [most[-3] + max(most[-2:])]
    return [fewest[0], most[0], len(re.findall(rf"= math\.exp2 .*{tile}", intermediate))]


def narrow_offsets(intermediate: str) -> list[str]:
    """Address computations of Triton's intermediate code that contain a 32-bit product of two values. A product with a
    constant is a position (tile number times tile size), which fits; a position times a stride may not."""
    definitions = {
        name: (operation, re.findall(r"%[\w#]+", operands), operands)
        for name, operation, operands in re.findall(r"(%\w+)(?::\d+)? = (?:\")?([\w.]+)(.*)", intermediate)
    }

    def constant(name: str) -> bool:
        operation, operands, _ = definitions.get(name, ("", [], ""))
        return operation == "arith.constant" or (operation == "tt.splat" and constant(operands[0]))

    def products(name: str, seen: set[str]) -> list[str]:
        if name in seen or name not in definitions:
            return []
        seen.add(name)
        operation, operands, text = definitions[name]
        if operation == "tt.load":  # an index read from memory is not computed here
            return []
        narrow = [product for operand in operands for product in products(operand, seen)]
        in_32_bits = re.search(r":.*\bi32\b|xi32>", text.split(" loc(")[0])
        if operation == "arith.muli" and in_32_bits and not any(constant(operand) for operand in operands):
            narrow.append(f"{name} = {operation}{text}")
        return narrow

    offsets = re.findall(r"= tt\.addptr %[\w#]+, (%\w+)", intermediate)
    return sorted({product for offset in offsets for product in products(offset, set())})


def _nvidia(cubin: bytes) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return {
        "registers": registers,
        "spilled": stack + local,
        "tensor": _mnemonics(code, r"\b((?:HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA)(?:\.\w+)*)"),
        "serialized": serialized(code),
        "exponentials_issued": len(re.findall(r"MUFU\.EX2", code)),
        "shuffles": len(re.findall(r"\bSHFL\b", code)),
        "tile_loads": len(re.findall(r"\bUTMALDG\b", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
    }


def serialized(code: str) -> int:
    """How many wgmma (HGMMA) are waited for before the next one of the same step is issued: the assembler's way out
    where it cannot prove that nobody touches the sums meanwhile. A step along the width issues several; its last one
    alone closes the group, by `gsb0`. Two groups with nothing but waits between them were one step."""
    instructions = re.findall(r"\b(HGMMA\.[^;\n]*|WARPGROUP\.\w+[^;\n]*|LDGDEPBAR|BAR\.SYNC|BRA|\.L_x_\d+:)", code)
    count, closed, waited = 0, False, False
    for instruction in instructions:
        if instruction.startswith("HGMMA"):
            count += closed and waited
            closed, waited = "gsb0" in instruction, False
        elif "DEPBAR.LE gsb0, 0x0" in instruction:
            waited = True
        elif not instruction.startswith("WARPGROUP"):
            closed = False
    return count


def _amd(code: str) -> dict[str, Any]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # type: ignore[index]

    return {
        "registers": field("vgpr_count"),
        "spilled": field("private_segment_fixed_size"),
        "tensor": _mnemonics(code, r"\b(v_mfma_\w+)"),
        "exponentials_issued": len(re.findall(r"\bv_exp_f32", code)),
        "instructions": len(re.findall(r"^\t[vs]_\w+", code, re.M)),
    }


def _mnemonics(code: str, pattern: str) -> dict[str, int]:
    return dict(sorted(Counter(re.findall(pattern, code)).items()))


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def table(architectures: Sequence[str], every: int = 1, first: int = 0, jobs: int = 1) -> list[dict[str, Any]]:
    """One row for each variant of each architecture, or for every n-th from the `first` on."""
    work = [(variant, name) for name in architectures for variant in variants(name)[first::every]]
    if jobs == 1:
        return [inspect(*pair) for pair in work]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(inspect, *zip(*work, strict=True)))
