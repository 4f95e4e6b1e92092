"""Ahead-of-time compilation of the kernels for GPUs that are not at hand, and what the compiled code uses.

`variants(architecture)` lists what the launcher asks for, with every candidate tile shape; `inspect` compiles one as
the just-in-time compiler would on the device and counts registers, spills, shared memory, tensor-core instructions and
exponentials in the machine code. `python -m bench aot` writes the table down.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .configs import GROUP, Config, candidates
from .exact import exact_rows_kernel
from .gradient import VECTOR_BLOCK, coefficients_kernel, gradient_kernel
from .statistics import statistics_kernel
from .tiles import EMBEDDINGS, LOGITS, NONE, PAIRED

KERNELS = {
    "statistics": statistics_kernel,
    "gradient": gradient_kernel,
    "coefficients": coefficients_kernel,
    "exact": exact_rows_kernel,
}
MODES = {"none": NONE.value, "logits": LOGITS.value, "paired": PAIRED.value, "embeddings": EMBEDDINGS.value}
POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
ARCHITECTURES = tuple(SHARED_LIMIT)
_INTEGER_POINTERS = ("positive", "row_segment", "column_segment")
_OPTIONAL = {
    "positive": "positive",
    "row_segment": "segments",
    "column_segment": "segments",
    "row_threshold": "ranks",
    "column_threshold": "ranks",
    "row_bias": "biases",
    "column_bias": "biases",
    "row_weight": "biases",
    "column_weight": "biases",
    "previous": "previous",
}


@dataclass(frozen=True)
class Variant:
    """kernel: a key of KERNELS; mode: a key of MODES; features: of positive, segments, ranks, biases and
    previous; even: the width is a multiple of the step."""

    kernel: str
    mode: str
    config: Config
    dtype: str = "bf16"
    teacher_dtype: str = ""  # where it is another than the student's
    g_dtype: str = ""
    aligned: bool = True  # strides divisible by 16
    tied: bool = False
    student: bool = True
    even: bool = True
    features: frozenset[str] = frozenset({"positive"})
    precision: str = "ieee"

    @property
    def name(self) -> str:
        parts = [
            self.kernel,
            self.mode + ("-tied" if self.tied else "") + ("" if self.student else "-teacher-only"),
        ]
        c = self.config
        parts += [self.dtype if self.dtype != "fp32" else self.precision, *sorted(self.features)]
        parts += [
            *(f"{what}-{dtype}" for what, dtype in (("teacher", self.teacher_dtype), ("g", self.g_dtype)) if dtype),
            "even" if self.even else "odd" if self.aligned else "unaligned",
            f"{c.block_m}x{c.block_n}x{c.block_d}w{c.warps}s{c.stages}",
        ]
        return " ".join(parts)

    @property
    def plain(self) -> bool:
        return self.even and not self.features & {"segments", "ranks"}


_EVERYTHING = frozenset({"positive", "segments", "biases", "ranks"})
_WITHOUT_RANKS = _EVERYTHING - {"ranks"}


def _cases() -> list[Variant]:
    """What the launcher asks for, without tile shapes: every kernel and mode, plain as in the usual losses, and with
    everything at once; features that only load another vector are covered by the latter."""
    any_shape = Config(64, 64, 64, 8, 2)
    cases = []
    for mode, tied in (
        ("none", False),
        ("logits", True),
        ("logits", False),
        ("embeddings", False),
        ("paired", True),
        ("paired", False),
    ):
        plain = Variant("statistics", mode, any_shape, tied=tied)
        full = replace(plain, features=_EVERYTHING, even=False)
        gradient = replace(plain, kernel="gradient")
        gradient_full = replace(gradient, features=_WITHOUT_RANKS, even=False)
        cases += [plain, full, gradient, gradient_full]
        if mode != "paired":
            cases.append(replace(plain, kernel="exact", features=_WITHOUT_RANKS - {"positive"}, even=False))
        if mode in ("logits", "embeddings"):  # a second teacher
            later = replace(plain, student=False, even=False, features=frozenset({"segments", "biases"}))
            cases.append(later)
            cases.append(replace(later, kernel="gradient", features=_WITHOUT_RANKS | {"previous"}))
    return cases


def _odd_cases() -> list[Variant]:
    """One more of each kernel with a teacher: wider than the student, and of width 100, whose strides are not divisible
    by 16. The sums of earlier teachers are fp32 (g). coefficients has no tiles."""
    any_shape = Config(64, 64, 64, 8, 2)
    cases = [Variant("coefficients", mode, any_shape, features=frozenset()) for mode in ("none", "embeddings")]
    for kernel in ("statistics", "gradient", "exact"):
        features = frozenset() if kernel == "exact" else frozenset({"positive"})
        case = Variant(kernel, "embeddings", any_shape, features=features)
        cases.append(replace(case, teacher_dtype="fp32"))
        cases.append(replace(case, even=False, aligned=False, g_dtype="fp32" if kernel == "gradient" else ""))
    return cases


def variants(architecture: str) -> list[Variant]:
    """Every case in bf16 with every candidate tile shape of the architecture; in fp16, whose code differs by the
    instructions' suffix, and in fp32, the plain and the full ones."""
    found = []
    wide = "ieee" if architecture.startswith("gfx") else "tf32x3"
    for case in (*_cases(), *_odd_cases()):
        typed = [case]
        usual = case in _cases()
        if usual and case.mode in ("none", "embeddings") and "ranks" not in case.features:
            typed.append(replace(case, dtype="fp16"))
        if usual and not case.tied:
            typed.append(replace(case, dtype="fp32", precision=wide))
        if usual and case.mode == "none":
            typed.append(replace(case, dtype="fp32", precision="tf32"))
        if case.teacher_dtype:
            typed = [replace(case, precision=wide)]
        for variant in typed:
            if variant.kernel == "coefficients":
                found.append(variant)
                continue
            itemsize = 4 if "fp32" in (variant.dtype, variant.teacher_dtype) else 2
            taught, paired = variant.mode != "none", variant.mode == "paired"
            shapes = candidates(variant.kernel, taught, paired, variant.plain, itemsize, architecture)
            found += [replace(variant, config=shape) for shape in shapes]
    return found


def compile_variant(variant: Variant, architecture: str) -> Any:
    kernel = KERNELS[variant.kernel]
    teacher_dtype = variant.teacher_dtype or variant.dtype
    constants = {
        "TOP": 6,
        "BLOCK": VECTOR_BLOCK,
        "STATISTICS": int(variant.student) + 2 * (variant.mode != "none") + ("ranks" in variant.features),
        "STUDENT": variant.student,
        "TEACHER": MODES[variant.mode],
        "TIED": variant.tied,
        "GROUP": GROUP,
        "EVEN": variant.even,
        "TEACHER_EVEN": variant.even,
        "PRECISION": variant.precision if variant.dtype == "fp32" else "ieee",
        "TEACHER_PRECISION": variant.precision if teacher_dtype == "fp32" else "ieee",
        **variant.config.constants(),
    }
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = _kind(name, variant)
        if kind == "constexpr":
            constexprs[(index,)] = constants.get(name, 1 if name.endswith("_step") else None)
        elif (
            kind.startswith("*")
            or (name.endswith("_stride") and variant.aligned)
            or name == "edge"
            or ("width" in name and variant.even)
        ):
            attributes[(index,)] = [["tt.divisibility", 16]]
        signature[name] = kind
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=_target(architecture), options=variant.config.options())


def _kind(name: str, variant: Variant) -> str:
    if name.isupper() or name.endswith("_step"):
        return "constexpr"
    if name in _OPTIONAL and _OPTIONAL[name] not in variant.features:
        return "constexpr"
    if name in _INTEGER_POINTERS:
        return "*i64"
    if name in ("suspect", "fine") or name.endswith("_fine"):
        return "*i8"
    if name in ("x", "y", "teacher_x", "teacher_y", "g", "mirror_g"):
        own = {"t": variant.teacher_dtype, "g": variant.g_dtype, "m": variant.g_dtype}.get(name[0])
        return POINTERS[own or variant.dtype]
    if name.endswith(("_stride", "_start", "_end", "width")) or name in ("edge", "rows", "columns", "length"):
        return "i32"
    return "*fp32"


def _target(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64)


def inspect(variant: Variant, architecture: str) -> dict[str, Any]:
    """What one variant compiles to. registers and spilled (bytes, stack included) are a thread's, shared bytes a
    program's; exponentials_issued counts machine instructions a thread, over its `entries`; serialised, on sm_90,
    tensor instructions that wait for one another. From the intermediate code: matmuls; exponentials of whole tiles, the
    fewest that a program takes, the most, and all in the code; and narrow_offsets, the addresses that rest on a product
    in 32 bits."""
    compiled = compile_variant(variant, architecture)
    nvidia = architecture.startswith("sm_")
    c = variant.config
    intermediate = compiled.asm["ttir"]
    return {
        "variant": variant.name,
        "kernel": variant.kernel,
        "mode": variant.mode,
        "tied": variant.tied,
        "plain": variant.plain and "fp32" not in (variant.dtype, variant.teacher_dtype),
        "dtype": variant.dtype,
        "architecture": architecture,
        "triton": triton.__version__,
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[architecture],
        "entries": c.block_m * c.block_n // ((32 if nvidia else 64) * c.warps),
        **(_nvidia(compiled.asm["cubin"]) if nvidia else _amd(compiled.asm["amdgcn"])),
        "matmuls": len(re.findall(r"= tt\.dot ", intermediate)),
        "exponentials": exponentials(intermediate, f"tensor<{c.block_m}x{c.block_n}xf32"),
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
        found = [found for operand in operands for found in products(operand, seen)]
        narrow = re.search(r":.*\bi32\b|xi32>", text.split(" loc(")[0])
        if operation == "arith.muli" and narrow and not any(constant(operand) for operand in operands):
            found.append(f"{name} = {operation}{text}")
        return found

    offsets = re.findall(r"= tt\.addptr %[\w#]+, (%\w+)", intermediate)
    return sorted({found for offset in offsets for found in products(offset, set())})


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
        "serialised": serialised(code),
        "exponentials_issued": len(re.findall(r"MUFU\.EX2", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
    }


def serialised(code: str) -> int:
    """How many wgmma (HGMMA) are waited for before the next one of the same step is issued: the assembler's way out
    where it cannot prove that nobody touches the sums meanwhile. A step along the width issues several; its last one
    alone closes the group, by `gsb0`. Two groups with nothing but waits between them were one step."""
    found = re.findall(r"\b(HGMMA\.[^;\n]*|WARPGROUP\.\w+[^;\n]*|LDGDEPBAR|BAR\.SYNC|BRA|\.L_x_\d+:)", code)
    count, closed, waited = 0, False, False
    for instruction in found:
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
    found = re.findall(pattern, code)
    return {name: found.count(name) for name in sorted(set(found))}


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def table(architectures: Sequence[str], every: int = 1, first: int = 0, jobs: int = 1) -> list[dict[str, Any]]:
    """One row for each variant of each architecture, or for every n-th from the `first` on."""
    work = [(variant, name) for name in architectures for variant in variants(name)[first::every]]
    if jobs == 1:
        return [inspect(*pair) for pair in work]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(inspect, *zip(*work, strict=True)))
