"""The kernels as the Triton backend compiles them: which variants there are for an architecture, and one compiled ahead
of time, as the just-in-time compiler would on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from softclip_kernels.backends.triton import (
    adjoint,
    coefficients,
    gradients,
    linear_forms,
    norms,
    online,
    persistent,
    products,
    reduced_loss,
    scalars,
    softmax_backward,
    softmax_backward_persistent,
    softmax_exchange,
    softmax_forward,
    softmax_forward_persistent,
    sums,
    total,
)
from softclip_kernels.backends.triton.passes import MODES
from softclip_kernels.backends.triton.shapes import (
    EXCHANGE,
    GROUP,
    LIBRARY,
    SPLIT,
    TMA,
    UNBIASED,
    Shape,
    candidates,
    product_candidates,
)

# Kind of kernel to its module, which holds ARGUMENTS, and its name there.
KERNELS: dict[str, tuple[ModuleType, str]] = {
    "forward": (softmax_forward, "softmax_forward_kernel"),
    "forward-persistent": (softmax_forward_persistent, "softmax_forward_persistent_kernel"),
    "backward": (softmax_backward, "softmax_backward_kernel"),
    "backward-persistent": (softmax_backward_persistent, "softmax_backward_persistent_kernel"),
    "coefficients": (coefficients, "coefficients_kernel"),
    "online": (online, "online_kernel"),
    "exchange": (softmax_exchange, "softmax_exchange_kernel"),
    "sums": (sums, "sums_kernel"),
    "norms": (norms, "norms_kernel"),
    "scalars": (scalars, "scalars_kernel"),
    "products": (products, "products_kernel"),
    "finish": (gradients, "finish_kernel"),
    "total": (total, "total_kernel"),
    "loss": (reduced_loss, "loss_kernel"),
    "adjoint": (adjoint, "adjoint_kernel"),
}
# Of those without a matrix product, the modes that they distinguish.
VECTOR_MODES = {
    "coefficients": ("none", "embeddings", "transposed"),
    "sums": ("none", "embeddings", "transposed"),
    "norms": ("none",),
    "scalars": ("none", "logits", "embeddings"),
    "total": ("none",),
    "loss": ("none", "logits"),
    "adjoint": ("none", "logits"),
}
SHARED_LIMIT = {  # architecture to the bytes of shared memory that a program may take
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
ARCHITECTURES = tuple(SHARED_LIMIT)
# Optional argument to the feature of a variant that brings it.
FEATURES = {
    "positive_column": "positive",
    "row_segment": "segments",
    "column_segment": "segments",
    "row_threshold": "ranks",
    "column_threshold": "ranks",
    "row_bias": "biases",
    "column_bias": "biases",
    "row_weight": "biases",
    "column_weight": "biases",
    "previous": "previous",
    "teacher_scale": "teacher's scale",
    "row_ranks": "ranks",
    "column_ranks": "ranks",
    "top_row_bias": "biases",
    "top_column_bias": "biases",
    "gx": "gx",
    "gy": "gy",
    "positive": "positive",
    "coefficient": "positive",
    "unit": "unit",
    "result": "result",
    "inner": "inner",
    "zeroed": "positive",
    **{name: "vectors" for name in linear_forms.VECTORS},
}


@dataclass(frozen=True)
class Variant:
    """kernel: a key of KERNELS; mode: a key of MODES; features: values of FEATURES; even: the width is a multiple of
    the step."""

    kernel: str
    mode: str
    shape: Shape
    dtype: str = "bf16"
    teacher_dtype: str = ""  # where it is another than the student's
    g_dtype: str = ""
    previous_dtype: str = "fp32"
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
        parts += [self.dtype if self.dtype != "fp32" else self.precision, *sorted(self.features)]
        parts += [
            *(f"{what}-{dtype}" for what, dtype in (("teacher", self.teacher_dtype), ("g", self.g_dtype)) if dtype),
            "even" if self.even else "odd" if self.aligned else "unaligned",
            self.shape.name,
        ]
        return " ".join(parts)

    @property
    def three_products(self) -> bool:
        """Some fp32 operand is multiplied in three tf32 products."""
        return self.precision == "tf32x3" and "fp32" in (self.dtype, self.teacher_dtype)

    @property
    def plain(self) -> bool:
        return self.even and not self.features & {"segments", "ranks"}


_EVERYTHING = frozenset({"positive", "segments", "biases", "ranks"})
_WITHOUT_RANKS = _EVERYTHING - {"ranks"}


def _cases() -> list[Variant]:
    """What the launcher asks for, without tile shapes: every kernel and mode, plain as in the usual losses, and with
    everything at once; features that only load another vector are covered by the latter."""
    any_shape = Shape(64, 64, 64, 8, 2)
    cases = []
    for mode, tied in (
        ("none", False),
        ("logits", True),
        ("logits", False),
        ("embeddings", False),
        ("transposed", True),
        ("transposed", False),
    ):
        plain = Variant("forward", mode, any_shape, tied=tied)
        full = replace(plain, features=_EVERYTHING, even=False)
        backward = replace(plain, kernel="backward")
        backward_full = replace(backward, features=_WITHOUT_RANKS, even=False)
        cases += [plain, full, backward, backward_full]
        if mode != "none":
            biased = plain.features | {"biases"}
            cases += [replace(plain, features=biased), replace(backward, features=biased)]
        if mode != "transposed":
            cases.append(replace(plain, kernel="online", features=_WITHOUT_RANKS - {"positive"}, even=False))
        if mode in ("logits", "embeddings"):  # a second teacher
            later = replace(plain, student=False, even=False, features=frozenset({"segments", "biases"}))
            cases.append(later)
            cases.append(replace(later, kernel="backward", features=_WITHOUT_RANKS | {"previous"}))
    return cases


def _odd_cases() -> list[Variant]:
    """One more of each kernel with a teacher: wider than the student, and of width 100, whose strides are not divisible
    by 16. The sums of earlier teachers are fp32 (g)."""
    any_shape = Shape(64, 64, 64, 8, 2)
    cases = []
    for kernel in ("forward", "backward", "online"):
        features = frozenset() if kernel == "online" else frozenset({"positive"})
        case = Variant(kernel, "embeddings", any_shape, features=features)
        cases.append(replace(case, teacher_dtype="fp32"))
        cases.append(replace(case, even=False, aligned=False, g_dtype="fp32" if kernel == "backward" else ""))
    return cases


def variants(architecture: str) -> list[Variant]:
    """Every case in bf16 with every candidate tile shape of the architecture; in fp16, whose code differs by the
    instructions' suffix, and in fp32, the plain and the full ones."""
    listed = []
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
            itemsize = 4 if "fp32" in (variant.dtype, variant.teacher_dtype) else 2
            for shape in candidates(variant.kernel, variant.mode, variant.plain, itemsize, architecture):
                if "biases" not in variant.features or shape.way not in UNBIASED:
                    listed += _as_launched(replace(variant, shape=shape))
    return listed + _vector_variants() + product_variants(architecture)


def _vector_variants() -> list[Variant]:
    """Of the kernels whose tiles are no matrix product's, in the modes that they distinguish; plain, and with
    everything."""
    everything = _EVERYTHING | {"unit", "teacher's scale", "previous", "vectors"}
    shapes = {  # a mirrored super-block's sums know its tiles, others take any
        "coefficients": Shape(1, 1, 1, coefficients.WARPS, 3),
        "sums": Shape(128, 64, 1, 4, 3),
        "norms": Shape(norms.ROWS, norms.WIDTH, 1, 4, 3),
        "scalars": Shape(1, 1, 1, 4, 3),
        "total": Shape(1, 1, 1, 4, 3),
        "loss": Shape(1, 1, 1, 4, 3),
        "adjoint": Shape(1, 1, 1, 4, 3),
    }
    plain = [Variant(kernel, mode, shape) for kernel, shape in shapes.items() for mode in VECTOR_MODES[kernel]]
    return [*plain, *(replace(each, features=everything, even=False, aligned=False) for each in plain)]


def product_variants(architecture: str) -> list[Variant]:
    """The products with every candidate, of both gradients and of each alone, and of a width that is not in whole
    tiles. What finishes their sums, with everything: in the embeddings' dtype, in place, without an alignment, for the
    scale alone."""
    any_shape, everything = Shape(gradients.ROWS, gradients.WIDTH, 1, 4, 1), frozenset({"positive", "unit", "inner"})
    listed = []
    for dtype in ("bf16", "fp16"):
        for shape in product_candidates(True, 2, architecture):
            if shape.way != LIBRARY:
                both = Variant("products", "none", shape, dtype=dtype, features=frozenset({"gx", "gy"}))
                listed += [both, replace(both, even=False)]
                listed += [replace(both, features=frozenset({needed})) for needed in ("gx", "gy")]
        finish = Variant("finish", "none", any_shape, dtype=dtype, features=everything | {"result"})
        listed += [finish, replace(finish, g_dtype="fp32"), replace(finish, features=everything)]
        listed.append(replace(finish, features=finish.features | {"columns"}))
    return [*listed, replace(finish, dtype="fp32", even=False, aligned=False)]


def _as_launched(variant: Variant) -> list[Variant]:
    """What the shape's way makes of it. The student's part of a SPLIT is the variant without a teacher."""
    if variant.shape.way == EXCHANGE:
        return [
            replace(variant, kernel="exchange", features=variant.features | adds)
            for adds in (frozenset(), frozenset({"previous"}))
        ]
    if variant.shape.way == TMA:
        return [replace(variant, kernel=f"{variant.kernel}-persistent")]
    if variant.shape.way == SPLIT:
        features = variant.features | {"previous"}
        return [replace(variant, student=False, features=features, previous_dtype=variant.dtype)]
    return [variant]


def compile_variant(variant: Variant, architecture: str) -> Any:
    module, name = KERNELS[variant.kernel]
    kernel, constants = getattr(module, name), _constants(variant)
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, argument in enumerate(kernel.arg_names):
        kind = module.ARGUMENTS.get(argument, "constexpr")
        if kind.endswith("?") and FEATURES[argument] not in variant.features:
            signature[argument], constexprs[(index,)] = "constexpr", None
        elif kind in ("constexpr", "i32 step"):
            signature[argument], constexprs[(index,)] = "constexpr", constants.get(argument, 1)
        else:
            signature[argument] = _type(kind, variant)
            if _divisible(kind, variant):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=_target(architecture), options=variant.shape.options())


_BLOCKS = {
    "sums": sums.BLOCK,
    "total": total.AT_ONCE,
    "loss": reduced_loss.AT_ONCE,
    "adjoint": adjoint.BLOCK,
}


def _constants(variant: Variant) -> dict[str, Any]:
    teacher_dtype = variant.teacher_dtype or variant.dtype
    return {
        "SOURCE": MODES[variant.mode],  # the same numbers
        "LAST": "previous" not in variant.features,
        "TAUGHT": variant.mode != "none",
        "RANKED": "ranks" in variant.features,
        "MIRRORED": variant.mode == "transposed",
        "OWN_PRODUCT": variant.mode == "embeddings",
        "PART": softmax_exchange.ADD if "previous" in variant.features else softmax_exchange.STORE,
        "BLOCK": _BLOCKS.get(variant.kernel, coefficients.BLOCK),
        "ROWS": True,
        "SEEN": "segments" in variant.features,
        "POSITIVE": True,
        "STATISTICS": int(variant.student) + 2 * (variant.mode != "none") + ("ranks" in variant.features),
        "STUDENT": variant.student,
        "TEACHER": MODES[variant.mode],
        "TIED": variant.tied,
        "GROUP": GROUP,
        "FLATTEN": persistent.flat(variant.shape),
        "EVEN": variant.even,
        "TEACHER_EVEN": variant.even,
        "COLUMNS": variant.kernel == "loss" or "columns" in variant.features,
        "PRECISION": variant.precision if variant.dtype == "fp32" else "ieee",
        "TEACHER_PRECISION": variant.precision if teacher_dtype == "fp32" else "ieee",
        **variant.shape.constants(),
    }


def _type(kind: str, variant: Variant) -> str:
    """Triton's name for a type of ARGUMENTS."""
    dtypes = {
        "*student": variant.dtype,
        "*teacher": variant.teacher_dtype or variant.dtype,
        "*grad": variant.g_dtype or variant.dtype,
        "*previous": variant.previous_dtype,
    }
    if kind.startswith("box"):
        return f"tensordesc<{variant.dtype}{persistent.box(kind, variant.shape)}>"
    name = kind.removesuffix("?").split()[0]
    return f"*{dtypes[name]}" if name in dtypes else name


def _divisible(kind: str, variant: Variant) -> bool:
    """Whether the launcher finds that the value is divisible by 16."""
    usual = {"i32": False, "fp32": False, "i32 stride": variant.aligned, "i32 width": variant.even, "i32 edge": True}
    return usual.get(kind, not kind.startswith("box"))  # a descriptor's alignment is its own


def _target(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64)
