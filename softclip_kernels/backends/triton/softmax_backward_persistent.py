# mypy: disallow-untyped-defs=False
"""The hard block of G by programs that stay (persistent.py): the same entries as softmax_backward.py's, in the same
scratch. Boxes of G go by a descriptor too, which takes fewer registers and instructions than addresses do.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .coefficients import HEADROOM, all_in_range
from .passes import Pass
from .persistent import PersistentCall, box_product
from .shapes import Shape
from .softmax_gradient import finish
from .tiles import NONE, RANGES, exponents, grouped_tile, without_positives

ARGUMENTS = {
    "x": "box rows",
    "y": "box columns",
    "g": "box tile",
    "positive_column": "*i64?",
    "row_student_coefficient": "*fp32",
    "row_in_range": "*i8",
    "column_student_coefficient": "*fp32",
    "column_in_range": "*i8",
    "row_student_exponent": "*fp32",
    "column_student_exponent": "*fp32",
    "scalars": "*fp32",
    "width": "i32 width",
    **RANGES,
}


@triton.jit(do_not_specialize=["row_start", "row_end", "column_start", "column_end"])
def softmax_backward_persistent_kernel(
    x,
    y,
    g,
    positive_column,
    row_student_coefficient,
    row_in_range,
    column_student_coefficient,
    column_in_range,
    row_student_exponent,
    column_student_exponent,
    scalars,
    width,
    row_start,
    row_end,
    column_start,
    column_end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """The tiles of a super-block of G, in the order of softmax_forward_persistent_kernel. x and y are descriptors as
    there, g one of boxes (BLOCK_M, BLOCK_N): tiles are stored whole, because anything may lie in the scratch beyond a
    super-block's end (products.py)."""
    tiles_m = tl.cdiv(row_end - row_start, BLOCK_M)
    tiles_n = tl.cdiv(column_end - column_start, BLOCK_N)
    factor, reference, _, _ = exponents(scalars, HEADROOM, True)
    student = (
        factor,
        reference,
        (row_student_coefficient, None, row_student_exponent, None),
        (column_student_coefficient, None, column_student_exponent, None),
    )
    # Of one stage: in more, the box on its way out would keep memory of its own where the loop is not flat.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), num_stages=1, flatten=FLATTEN):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        first_i, first_j = row_start + tile_m * BLOCK_M, column_start + tile_n * BLOCK_N
        dot = box_product(x, y, first_i, first_j, width, BLOCK_M, BLOCK_N, BLOCK_D)

        i, j = first_i + tl.arange(0, BLOCK_M), first_j + tl.arange(0, BLOCK_N)
        inside_i, inside_j = i < row_end, j < column_end
        in_range = all_in_range(row_in_range, first_i, row_end, BLOCK_M)
        in_range &= all_in_range(column_in_range, first_j, column_end, BLOCK_N)
        value = finish(dot, dot, student, student, (i, j, inside_i, inside_j), in_range, True, NONE)[0]
        if positive_column is not None:
            value = without_positives(value, positive_column, i, inside_i, first_j, column_end, 1)
        g.store([tile_m * BLOCK_M, tile_n * BLOCK_N], value.to(g.dtype))


class PersistentBlocks:
    """Fills a super-block of G, which has no mirror."""

    def __init__(self, launch_pass: Pass, arguments: dict[str, Any], _: Tensor, shape: Shape) -> None:
        arguments = arguments | launch.constants(launch_pass, shape)
        processors = launch.processors(launch_pass.problem.x.device)
        self.call = PersistentCall(softmax_backward_persistent_kernel, arguments, shape, processors)
        self.shape = shape

    def __call__(self, i: slice, j: slice) -> None:
        self.call(**launch.over(self.shape, i, j))
