# mypy: disallow-untyped-defs=False
"""The hard forward pass by programs that stay (persistent.py): the same sums as softmax_forward.py's, in the same
slots.
"""

import triton
import triton.language as tl

from .persistent import box_product
from .sums import HEADROOM
from .tiles import (
    BOUND,
    FACTOR,
    SCALE,
    SUPER_BLOCK,
    center,
    grouped_tile,
    positives,
    sum_rows,
)

ARGUMENTS = {
    "x": "box rows",
    "y": "box columns",
    "positive_column": "*i64?",
    "scalars": "*fp32",
    "row_sums": "*fp32",
    "column_sums": "*fp32",
    "positive_logit": "*fp32",
    "width": "i32 width",
    **SUPER_BLOCK,
}


@triton.jit(do_not_specialize=["row_start", "row_end", "column_start", "column_end"])
def softmax_forward_persistent_kernel(
    x,
    y,
    positive_column,
    scalars,
    row_sums,
    column_sums,
    positive_logit,
    width,
    row_start,
    row_end,
    column_start,
    column_end,
    edge,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """The tiles of a super-block: of p programs, the n-th takes tiles n, n + p, n + 2p, ... x (N, D) and y (M, D) are
    descriptors as for box_product; the rest is as for softmax_forward_kernel, with one sum a slot. FLATTEN: one loop
    over the steps of all tiles (persistent.py)."""
    tiles_m = tl.cdiv(row_end - row_start, BLOCK_M)
    tiles_n = tl.cdiv(column_end - column_start, BLOCK_N)
    scale = tl.load(scalars + SCALE)
    factor = tl.load(scalars + FACTOR)
    reference = center(tl.load(scalars + BOUND), HEADROOM)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        corner_i, corner_j = row_start + tile_m * BLOCK_M, column_start + tile_n * BLOCK_N
        dot = box_product(x, y, corner_i, corner_j, width, BLOCK_M, BLOCK_N, BLOCK_D)

        rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)  # from the tile's corner: fewer registers
        left_i, left_j = row_end - corner_i, column_end - corner_j
        if positive_column is not None:
            column = positives(positive_column, corner_i + rows, rows < left_i, corner_j, column_end, BLOCK_N)
            if tl.max(column) >= 0:
                positive_dot = tl.sum(tl.where(columns[None, :] == column[:, None], dot, 0.0), 1)
                tl.store(positive_logit + corner_i + rows, positive_dot * scale, mask=column >= 0)
        e = tl.exp2(dot * factor - reference)
        if (left_i < BLOCK_M) | (left_j < BLOCK_N):
            e = tl.where((rows < left_i)[:, None] & (columns < left_j)[None, :], e, 0.0)
        slot_i = row_sums + tile_n.to(tl.int64) * edge + tile_m * BLOCK_M
        slot_j = column_sums + tile_m.to(tl.int64) * edge + tile_n * BLOCK_N
        tl.store(slot_i + rows, tl.sum(e, 1), mask=rows < left_i)
        tl.store(slot_j + columns, sum_rows(e), mask=columns < left_j)
