# mypy: disallow-untyped-defs=False
"""The backward pass of a transposed teacher, one tile of logits in a program: each of two mirrored tiles leaves what it
brings to the other in the other's scratch.

    G_IJ = S(z_IJ) + T(z_JI).T      S through the student's softmaxes, T through the teacher's of the mirror

Beside softmax_backward_kernel, which holds the logits of both tiles and shares one exponential between them, this one
has tiles of twice or four times the size, and rounds S to the scratch's dtype before T is added.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .call import Call
from .coefficients import HEADROOM, all_in_range
from .passes import Pass
from .shapes import GROUP, Shape
from .softmax_gradient import coefficient_sum, through_softmax
from .tiles import (
    LAYOUT,
    MATRICES,
    SUPER_BLOCK,
    exponents,
    grouped_tile,
    product,
    store,
    visible,
    without_positives,
)

# What a launch does with its tiles' own part and with their mirrors'.
STORE = tl.constexpr(0)  # store both
ADD = tl.constexpr(1)  # add both
STORE_OWN = tl.constexpr(2)  # store its own, leave the mirror's alone
ADD_MIRROR = tl.constexpr(3)  # the other way round, and add

ARGUMENTS = {
    **{name: MATRICES[name] for name in ("x", "y")},
    "positive_column": "*i64?",
    "row_segment": "*i64?",
    "column_segment": "*i64?",
    "row_student_coefficient": "*fp32",
    "row_teacher_coefficient": "*fp32",
    "column_student_coefficient": "*fp32",
    "column_teacher_coefficient": "*fp32",
    "row_student_exponent": "*fp32",
    "row_teacher_exponent": "*fp32",
    "column_student_exponent": "*fp32",
    "column_teacher_exponent": "*fp32",
    "row_in_range": "*i8",
    "column_in_range": "*i8",
    "row_weight": "*fp32?",
    "column_weight": "*fp32?",
    "row_bias": "*fp32?",
    "column_bias": "*fp32?",
    "scalars": "*fp32",
    "g": "*grad",
    "mirror_g": "*grad",
    **{name: LAYOUT[name] for name in ("x_stride", "x_step", "y_stride", "y_step", "width")},
    **SUPER_BLOCK,
}


@triton.jit
def put(tile, pointers, ADDS: tl.constexpr, whole, mask):
    """Stores the tile, or adds it to what is there."""
    if ADDS:
        if whole:
            tile += tl.load(pointers)
        else:
            tile += tl.load(pointers, mask=mask, other=0.0)
    store(pointers, tile, whole, mask)


@triton.jit
def part_of_tile(tile, softmax, at, in_range, TIED: tl.constexpr):
    """The gradient through one pair of softmaxes, (factor, reference, rows, columns) of through_softmax. tile: logits,
    or with TIED and in range their exponentials already."""
    factor, reference, rows, columns = softmax
    if in_range:
        if TIED:
            value = tile * coefficient_sum(rows, columns, at)
        else:
            value = through_softmax(tile, factor, reference, rows, columns, at, True)
    else:
        value = through_softmax(tile, factor, reference, rows, columns, at, False)
    return value


@triton.jit(do_not_specialize=["row_start", "row_end", "column_start", "column_end"])
def softmax_exchange_kernel(
    x,
    y,
    positive_column,
    row_segment,
    column_segment,
    row_student_coefficient,
    row_teacher_coefficient,
    column_student_coefficient,
    column_teacher_coefficient,
    row_student_exponent,
    row_teacher_exponent,
    column_student_exponent,
    column_teacher_exponent,
    row_in_range,
    column_in_range,
    row_weight,
    column_weight,
    row_bias,
    column_bias,
    scalars,
    g,
    mirror_g,
    x_stride,
    x_step,
    y_stride,
    y_step,
    width,
    row_start,
    row_end,
    column_start,
    column_end,
    edge,
    PART: tl.constexpr,
    TIED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of logits of rows [row_start, row_end) and columns [column_start, column_end): its own part to g (rows
    of the super-block, edge), its mirror's to mirror_g (columns of the super-block, edge), as PART says."""
    tiles_m = tl.cdiv(row_end - row_start, BLOCK_M)
    tiles_n = tl.cdiv(column_end - column_start, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP)
    first_i, first_j = row_start + tile_m * BLOCK_M, column_start + tile_n * BLOCK_N
    i, j = first_i + tl.arange(0, BLOCK_M), first_j + tl.arange(0, BLOCK_N)
    inside_i, inside_j = i < row_end, j < column_end
    whole = (first_i + BLOCK_M <= row_end) & (first_j + BLOCK_N <= column_end)
    in_range = all_in_range(row_in_range, first_i, row_end, BLOCK_M)
    in_range &= all_in_range(column_in_range, first_j, column_end, BLOCK_N)
    in_range &= all_in_range(column_in_range, first_i, row_end, BLOCK_M)
    in_range &= all_in_range(row_in_range, first_j, column_end, BLOCK_N)
    factor, reference, teacher_factor, teacher_reference = exponents(scalars, HEADROOM, TIED)
    student = (
        factor,
        reference,
        (row_student_coefficient, None, row_student_exponent, None),
        (column_student_coefficient, None, column_student_exponent, None),
    )
    teacher = (  # of the mirror, whose columns are this tile's rows
        teacher_factor,
        teacher_reference,
        (column_teacher_coefficient, column_weight, column_teacher_exponent, column_bias),
        (row_teacher_coefficient, row_weight, row_teacher_exponent, row_bias),
    )
    safe_i, safe_j = tl.minimum(i, row_end - 1), tl.minimum(j, column_end - 1)
    matrix_x, matrix_y = (x, x_stride, x_step), (y, y_stride, y_step)
    dot = product(matrix_x, matrix_y, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
    at = (i, j, inside_i, inside_j)
    if TIED:  # noqa: SIM102, a constant and a condition
        if in_range:  # one exponential for both parts
            dot = tl.exp2(dot * factor - reference)
    # One part after the other, so that one is alive beside the logits.
    local_i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # not from i, which would keep registers
    local_j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if PART != ADD_MIRROR:
        value = part_of_tile(dot, student, at, in_range, TIED)
        if positive_column is not None:
            value = without_positives(value, positive_column, i, inside_i, first_j, column_end, 1)
        if row_segment is not None:
            value = tl.where(visible(at, row_segment, column_segment), value, 0.0)
        entry = local_i.to(tl.int64)[:, None] * edge + local_j[None, :]
        put(value, g + entry, PART == ADD, whole, inside_i[:, None] & inside_j[None, :])
    if PART != STORE_OWN:
        value = part_of_tile(dot, teacher, at, in_range, TIED)
        if positive_column is not None:
            value = without_positives(value, positive_column, j, inside_j, first_i, row_end, 0)
        if row_segment is not None:
            value = tl.where(visible(at, column_segment, row_segment), value, 0.0)
        entry = local_j.to(tl.int64)[:, None] * edge + local_i[None, :]
        put(tl.trans(value), mirror_g + entry, PART != STORE, whole, inside_j[:, None] & inside_i[None, :])


class Exchange:
    """Fills a super-block of G and its mirror: first the one, its own part to its scratch, the other's to the other's;
    then the other, adding to both. On the diagonal, where they are one, the tiles' own parts, then their mirrors'."""

    def __init__(self, launch_pass: Pass, arguments: dict[str, Any], mirror_g: Tensor, shape: Shape) -> None:
        self.g, self.mirror_g, self.shape = arguments["g"], mirror_g, shape
        arguments = arguments | launch.constants(launch_pass, shape) | {"GROUP": GROUP}
        self.calls = {
            part.value: Call(softmax_exchange_kernel, arguments | {"PART": part.value}, shape.options())
            for part in (STORE, ADD, STORE_OWN, ADD_MIRROR)
        }

    def __call__(self, i: slice, j: slice) -> None:
        if i == j:
            self._launch(STORE_OWN, i, i, g=self.g, mirror_g=self.g)
            self._launch(ADD_MIRROR, i, i, g=self.g, mirror_g=self.g)
        else:
            self._launch(STORE, i, j, g=self.g, mirror_g=self.mirror_g)
            self._launch(ADD, j, i, g=self.mirror_g, mirror_g=self.g)

    def _launch(self, part: tl.constexpr, i: slice, j: slice, **scratch: Any) -> None:
        self.calls[part.value](**scratch, **launch.over(self.shape, i, j))
