# mypy: disallow-untyped-defs=False
"""The largest norms of rows and columns, which bound the logits (scalars.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import Call, ceil_div, strides

ROWS, WIDTH = 16, 128  # of a program's tile of embeddings, which walks along the width

ARGUMENTS = {
    "x": "*student",
    "y": "*student",
    "x_stride": "i32 stride",
    "x_step": "i32 step",
    "y_stride": "i32 stride",
    "y_step": "i32 step",
    "width": "i32 width",
    "largest": "*fp32",
    "zeroed": "*fp32?",
    "rows": "i32",
    "columns": "i32",
}


@triton.jit
def largest_square(matrix, start, end, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The largest squared norm, fp32, of BLOCK_M rows from `start` on; matrix: (pointer, stride, step)."""
    pointer, stride, step = matrix
    i = start + tl.arange(0, BLOCK_M)
    rows = pointer + i.to(tl.int64)[:, None] * stride
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, width, BLOCK_N):
        d = (first + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        value = tl.load(rows + d * step, mask=(i < end)[:, None] & (d < width), other=0.0).to(tl.float32)
        squares += value * value
    return tl.max(tl.sum(squares, 1))


@triton.jit(do_not_specialize=["rows", "columns"])
def norms_kernel(
    x,
    y,
    x_stride,
    x_step,
    y_stride,
    y_step,
    width,
    largest,
    zeroed,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """largest (programs,) fp32: of every BLOCK_M rows of x (rows, width), then of y (columns, width), the largest
    squared norm. zeroed (rows,): becomes 0, which takes no launch of its own here."""
    index = tl.program_id(0)
    row_programs = tl.cdiv(rows, BLOCK_M)
    if index < row_programs:
        value = largest_square((x, x_stride, x_step), index * BLOCK_M, rows, width, BLOCK_M, BLOCK_N)
        if zeroed is not None:
            i = index * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(zeroed + i, tl.zeros((BLOCK_M,), tl.float32), mask=i < rows)
    else:
        start = (index - row_programs) * BLOCK_M
        value = largest_square((y, y_stride, y_step), start, columns, width, BLOCK_M, BLOCK_N)
    tl.store(largest + index, value)


def largest_squares(x: Tensor, y: Tensor, zeroed: Tensor | None = None) -> Tensor:
    """(programs,) fp32, as norms_kernel fills it, and with it `zeroed` (rows,) fp32."""
    rows, columns = x.shape[0], y.shape[0]
    of_rows, of_columns = programs(rows, columns)
    largest = x.new_empty(of_rows + of_columns, dtype=torch.float32)
    arguments = {
        "x": x,
        "y": y,
        "width": x.shape[1],
        "largest": largest,
        "zeroed": zeroed,
        "rows": rows,
        "columns": columns,
        "BLOCK_M": ROWS,
        "BLOCK_N": WIDTH,
        **strides(x=x, y=y),
    }
    Call(norms_kernel, arguments, {})(of_rows + of_columns)
    return largest


def programs(rows: int, columns: int) -> tuple[int, int]:
    """Of norms_kernel, for the rows and for the columns."""
    return ceil_div(rows, ROWS), ceil_div(columns, ROWS)
