"""The CUDA C++ kernels for Hopper (csrc/cuda, backends/cuda) as candidates beside Triton's: for which launches they are
offered, their launch, and the test on the user's own operands that they have to pass before the clock may choose them.

They fill the same slots with the same sums, and the same scratch with the same blocks of G, so all that surrounds a
launch stays as it is. docs/cuda.md.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..cuda import Unavailable, kernels
from ..cuda.driver import DriverError
from ..cuda.nvrtc import CompileError
from . import coefficients, launch, sums
from .cuda_call import Box, CudaCall, Zeros
from .passes import Pass
from .shapes import SM90_PAIR, SM90_SHAPE, Shape
from .tiles import BOUND, FACTOR, SCALE, TEACHER_BOUND, TEACHER_FACTOR
from .tuning import SelfTestError

logger = logging.getLogger("softclip_kernels")

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 512  # of the embeddings: so much of a panel of 128 rows stays in shared memory
MODES = ("none", "embeddings", "transposed")  # where a teacher's logits come from

# Of csrc/cuda/tiles.cuh and its kernels.
THREADS = 384
DEPTH = 64  # columns of a box
G_BOX = (64, DEPTH)
SHARED_BYTES = 227 * 1024  # that a block may have
MOST_STAGES = 12
STORE, ADD = range(2)  # enum Put


def why_not(kind: str, launch_pass: Pass) -> str | None:
    """Why these kernels are not offered for a pass; None where they are, compiled and loaded."""
    problem = launch_pass.problem
    reason = kernels.why_not(problem.x.device)
    if reason is not None:
        if kernels.forced() and problem.x.is_cuda:
            raise RuntimeError(f"SOFTCLIP_CUDA=1 asks for the CUDA kernels, which cannot run: {reason}")
        return reason
    reason = _unsuitable(kind, launch_pass)
    if reason is not None:
        return reason
    return _not_loaded(kind, launch_pass)


def _unsuitable(kind: str, launch_pass: Pass) -> str | None:
    mode, plain, _ = launch_pass.case
    problem = launch_pass.problem
    operands = [problem.x, problem.y, launch_pass.teacher_x, launch_pass.teacher_y]
    given = [operand for operand in operands if operand is not None]
    if kind not in ("forward", "backward") or mode not in MODES:
        return f"they have no {kind} pass with a teacher's logits from: {mode}"
    if not plain or any(operand.stride(0) < operand.shape[1] for operand in given):
        return (
            "they take neither segments nor ranks, and rows that are apart, of whole steps of 64 numbers and 16 bytes"
        )
    if not launch_pass.student or len(problem.teachers) > 1 or launch_pass.biased:
        return "they take one teacher at most, without biases"
    if {operand.dtype for operand in given} not in ({dtype} for dtype in DTYPES):
        return "they take bfloat16 or float16, one dtype for all embeddings"
    if max(operand.shape[1] for operand in given) > WIDEST:
        return f"they take widths up to {WIDEST}"
    if kind == "forward" and len({operand.shape[1] for operand in given}) > 1:
        return "their forward pass takes a teacher of the student's width"
    if kind == "forward" and launch_pass.mirrored and not launch_pass.tied:
        return "their forward pass takes a swapped teacher of the student's scale"
    return None


def _not_loaded(kind: str, launch_pass: Pass) -> str | None:
    """Compiles and loads what the pass needs. A kernel that cannot be had is no error: Triton has one."""
    device = launch_pass.problem.x.device
    for needed in _needed(kind, launch_pass):
        known = device, *needed
        if known in _failed and not kernels.forced():
            return _failed[known]
        if torch.cuda.is_current_stream_capturing() and not kernels.loaded(device, *needed):
            return "a CUDA graph is being captured, and they are not loaded yet"
        try:
            kernels.kernel(*needed, device)
        except (CompileError, DriverError, Unavailable) as error:
            if kernels.forced():
                raise
            _failed[known] = str(error).split("\n")[0]
            logger.warning("triton backend: the CUDA kernel %s is left out: %s", needed[1], error)
            return _failed[known]
    return None


_Kernel = tuple[str, str, kernels.Defines, int]  # file, name, macros, bytes of shared memory
_failed: dict[tuple[Any, ...], str] = {}  # by device and kernel, why


def _needed(kind: str, launch_pass: Pass) -> list[_Kernel]:
    x = launch_pass.problem.x
    if kind == "forward":
        return [_forward_pair_kernel(x, launch_pass.mirrored) if launch_pass.taught else _forward_kernel(x)]
    if launch_pass.teacher_x is not None:
        return [_backward_kernel(x), _backward_kernel(launch_pass.teacher_x, teacher=True)]
    return [_backward_kernel(x, launch_pass.mirrored, launch_pass.tied)]


def _forward_kernel(x: Tensor) -> _Kernel:
    column_sums = 4 * 128 * 4  # of the four warps of a consumer
    return _kernel("softmax_forward", x, column_sums, _FORWARD)


def _forward_pair_kernel(x: Tensor, mirrored: bool) -> _Kernel:
    row_sums, places = 4 * (3 + mirrored) * 128 * 4, 128 * 4 + 16
    return _kernel("softmax_forward_pair", x, row_sums + places, _FORWARD | _TEACHER | {"MIRROR": int(mirrored)}, 2)


def _backward_kernel(x: Tensor, mirrored: bool = False, tied: bool = False, teacher: bool = False) -> _Kernel:
    """teacher: x are a teacher's embeddings, whose logits' factor and bound the kernel reads for its own."""
    box_and_vectors = 8192 + (3072 if mirrored else 1024)
    macros: dict[str, str | int] = {
        **_TEACHER,
        "FLAG_GROUP": coefficients.FLAG_GROUP.value,
        "HEADROOM": f"{coefficients.HEADROOM.value}f",
        "MIRROR": int(mirrored),
        "TIED": int(tied),
    }
    if teacher:
        macros |= {"FACTOR": TEACHER_FACTOR.value, "BOUND": TEACHER_BOUND.value}
    return _kernel("softmax_backward", x, box_and_vectors, macros)


_FORWARD: dict[str, str | int] = {"SCALE": SCALE.value, "HEADROOM": f"{sums.HEADROOM.value}f"}
_TEACHER: dict[str, str | int] = {"TEACHER_FACTOR": TEACHER_FACTOR.value, "TEACHER_BOUND": TEACHER_BOUND.value}


def _kernel(name: str, x: Tensor, epilogue_bytes: int, macros: dict[str, str | int], products: int = 1) -> _Kernel:
    """With as many stages as the shared memory holds beside the panels and what the two consumers' epilogues need."""
    width, shape = x.shape[1], SM90_PAIR if products == 2 else SM90_SHAPE
    stage = 2 * DEPTH * _stage_rows(shape) + 16  # with its two barriers
    fixed = 2 * width * shape.block_n * products + 2 * epilogue_bytes + 16
    stages = min((SHARED_BYTES - fixed) // stage, MOST_STAGES)
    own = {"WIDTH": width, "STAGES": stages, "PAIR": products - 1, "FACTOR": FACTOR.value, "BOUND": BOUND.value}
    half = {"HALF": 1} if x.dtype == torch.float16 else {}
    return f"{name}.cu", name, tuple((own | macros | half).items()), fixed + stages * stage


def _stage_rows(shape: Shape) -> int:
    """Of a box of x; of y there are as many rows as a tile has columns."""
    return shape.block_m if shape == SM90_PAIR else shape.block_m // 2


class _Blocks:
    """A launch over super-blocks, by a block for each multiprocessor: `arguments` in the kernel's order, of which those
    behind `fixed` are set for every launch, the super-block's range among them."""

    def __init__(self, kernel: _Kernel, fixed: list[Any], *last: int) -> None:
        device = next(argument.device for argument in fixed if isinstance(argument, Tensor))
        self.call = CudaCall(kernels.kernel(*kernel, device), THREADS, [*fixed, *[0] * 4, *last])
        self.range = len(fixed)
        self.processors = launch.processors(device)

    def __call__(self, i: slice, j: slice, put: tuple[int, ...] = ()) -> None:
        values = (*put, i.start, i.stop, j.start, j.stop)
        self.call(self.processors, dict(enumerate(values, self.range - len(put))))


def _boxes(x: Tensor, y: Tensor, shape: Shape = SM90_SHAPE) -> list[Any]:
    return [Box(x, (_stage_rows(shape), DEPTH)), Box(y, (shape.block_n, DEPTH))]


class Sums:
    """The launch of softmax_forward.cu or, with a teacher, softmax_forward_pair.cu; `arguments` as
    softmax_forward_kernel takes them."""

    def __init__(self, launch_pass: Pass, arguments: dict[str, Any]) -> None:
        a = arguments
        sums = [a["row_sums"], a["column_sums"]]
        if launch_pass.taught:
            kernel = _forward_pair_kernel(a["x"], launch_pass.mirrored)
            teacher = (a["y"], a["x"]) if launch_pass.mirrored else (a["teacher_x"], a["teacher_y"])
            boxes = [*_boxes(a["x"], a["y"], SM90_PAIR), *_boxes(*teacher, SM90_PAIR)]
            sums += [a["mirror_row_sums"], a["mirror_column_sums"]]
        else:
            kernel, boxes = _forward_kernel(a["x"]), _boxes(a["x"], a["y"])
        fixed = [*boxes, a["positive_column"], a["scalars"], *sums, a["positive_logit"]]
        self.blocks = _Blocks(kernel, fixed, a["edge"])

    def __call__(self, programs: int, row_start: int, row_end: int, column_start: int, column_end: int) -> None:
        self.blocks(slice(row_start, row_end), slice(column_start, column_end))


class GradientBlocks:
    """Fills a super-block of G, and its mirror where the pass is mirrored, by softmax_backward.cu; `arguments` as
    softmax_backward_kernel takes them.

    A teacher's part, of embeddings of its own, is a second launch of the same kernel, which adds to the student's. A
    mirrored super-block is filled as by softmax_exchange.py: a launch on it and one on its mirror, each of which brings
    its own part and the other's. On the diagonal, where they are one, both parts are added to zeros, in whatever order:
    of two numbers the sum is the same. What is added is rounded to 16 bits before.
    """

    def __init__(self, launch_pass: Pass, arguments: dict[str, Any], mirror_g: Tensor, _: Shape) -> None:
        a, self.arguments, self.mirrored = arguments, arguments, launch_pass.mirrored
        g = arguments["g"]
        if self.mirrored:
            kernel = _backward_kernel(a["x"], launch_pass.mirrored, launch_pass.tied)
            self.upper, self.lower, self.diagonal = (
                self._blocks(kernel, own, other) for own, other in ((g, mirror_g), (mirror_g, g), (g, g))
            )
            self.zeros = Zeros(g)
            return
        self.own = self._one("student", a["x"], a["y"], g)
        self.added = self._one("teacher", a["teacher_x"], a["teacher_y"], g) if launch_pass.taught else None

    def __call__(self, i: slice, j: slice) -> None:
        if not self.mirrored:
            self.own(i, j, (STORE, STORE))
            if self.added is not None:
                self.added(i, j, (ADD, ADD))
        elif i == j:
            self.zeros()
            self.diagonal(i, i, (ADD, ADD))
        else:
            self.upper(i, j, (STORE, STORE))
            self.lower(j, i, (ADD, ADD))

    def _one(self, of: str, x: Tensor, y: Tensor, g: Tensor) -> _Blocks:
        """Without a mirror, which is given as the tile itself."""
        a = self.arguments
        vectors = self._vectors("row", of) + self._vectors("column", of)
        fixed = [*_boxes(x, y), Box(g, G_BOX), Box(g, G_BOX), a["positive_column"], a["scalars"], *vectors]
        return _Blocks(_backward_kernel(x, teacher=of == "teacher"), [*fixed, *[None] * 4, STORE, STORE])

    def _blocks(self, kernel: _Kernel, own: Tensor, other: Tensor) -> _Blocks:
        """A row of the tile is a column of the mirror, whose teacher's softmax it takes part in."""
        a = self.arguments
        student = self._vectors("row", "student") + self._vectors("column", "student")
        mirror = self._vectors("column", "teacher")[:2] + self._vectors("row", "teacher")[:2]
        boxes = [*_boxes(a["x"], a["y"]), Box(own, G_BOX), Box(other, G_BOX)]
        return _Blocks(kernel, [*boxes, a["positive_column"], a["scalars"], *student, *mirror, STORE, STORE])

    def _vectors(self, direction: str, of: str) -> list[Tensor]:
        names = (f"{of}_coefficient", f"{of}_exponent", "in_range")
        return [self.arguments[f"{direction}_{name}"] for name in names]


def check(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises SelfTestError unless every row (the last dimension) agrees with Triton's, up to `tolerance` times its
    largest entry. Waits for the GPU."""
    if not found.numel():
        return
    found, expected = found.float(), expected.float()
    difference = torch.where(found == expected, 0.0, found - expected).abs().amax(-1)  # infinities agree
    allowed = tolerance * expected.abs().amax(-1)
    wrong = ~(difference <= allowed)  # NaN is no agreement
    if bool(wrong.any()):
        raise SelfTestError(f"{what} differ from Triton's in {int(wrong.sum())} rows, by {float(difference.max()):.3g}")
