# mypy: disallow-untyped-defs=False
"""The numbers of a launch that are known on the device alone, `scalars` as tiles.py lists them: above all a bound of
the logits, from the largest norms of rows and columns, by which the references of exponentials are chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem, Source
from .call import Call
from .tiles import (
    BOUND,
    FACTOR,
    LOG2E,
    SCALE,
    TEACHER_BOUND,
    TEACHER_FACTOR,
    TOP_COLUMN_BIAS,
    TOP_ROW_BIAS,
)

ROWS, WIDTH = 16, 128  # of a program's tile of embeddings, which walks along the width
AT_ONCE = tl.constexpr(1024)  # partial maxima that are reduced at once

NORMS_ARGUMENTS = {
    "x": "*student",
    "y": "*student",
    "x_stride": "i32 stride",
    "x_step": "i32 step",
    "y_stride": "i32 stride",
    "y_step": "i32 step",
    "width": "i32 width",
    "largest": "*fp32",
    "rows": "i32",
    "columns": "i32",
}
SCALARS_ARGUMENTS = {
    "largest": "*fp32",
    "teacher_largest": "*fp32",
    "known_bounds": "*fp32?",
    "scale": "*fp32",
    "teacher_scale": "*fp32?",
    "top_row_bias": "*fp32?",
    "top_column_bias": "*fp32?",
    "scalars": "*fp32",
    "bounds": "*fp32",
    "row_programs": "i32",
    "programs": "i32",
    "teacher": "i32",
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
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """largest (programs,) fp32: of every BLOCK_M rows of x (rows, width), then of y (columns, width), the largest
    squared norm."""
    index = tl.program_id(0)
    row_programs = tl.cdiv(rows, BLOCK_M)
    if index < row_programs:
        value = largest_square((x, x_stride, x_step), index * BLOCK_M, rows, width, BLOCK_M, BLOCK_N)
    else:
        start = (index - row_programs) * BLOCK_M
        value = largest_square((y, y_stride, y_step), start, columns, width, BLOCK_M, BLOCK_N)
    tl.store(largest + index, value)


@triton.jit
def norms_product(largest, row_programs, programs):
    """The largest norm of the rows times the largest of the columns."""
    of_rows = tl.zeros((AT_ONCE,), tl.float32)
    of_columns = of_rows
    for start in range(0, programs, AT_ONCE):
        index = start + tl.arange(0, AT_ONCE)
        square = tl.load(largest + index, mask=index < programs, other=0.0)
        of_rows = tl.maximum(of_rows, tl.where(index < row_programs, square, 0.0))
        of_columns = tl.maximum(of_columns, tl.where(index < row_programs, 0.0, square))
    return tl.sqrt(tl.max(of_rows)) * tl.sqrt(tl.max(of_columns))


@triton.jit(do_not_specialize=["row_programs", "programs", "teacher"])
def scalars_kernel(
    largest,
    teacher_largest,
    known_bounds,
    scale,
    teacher_scale,
    top_row_bias,
    top_column_bias,
    scalars,
    bounds,
    row_programs,
    programs,
    teacher,
    OWN_PRODUCT: tl.constexpr,
    TAUGHT: tl.constexpr,
):
    """One program: a pass's `scalars`, and of `bounds` (1 + K,) the student's and the teacher's, the teacher-th. They
    follow from what norms_kernel found of the student's embeddings and of the teacher's, or from `known_bounds`.
    OWN_PRODUCT: the teacher's logits are a product of its own, not the student's times a ratio."""
    student_scale = tl.load(scale)
    if known_bounds is not None:
        student_bound = tl.load(known_bounds)
    else:
        student_norms = norms_product(largest, row_programs, programs)
        student_bound = tl.abs(student_scale) * student_norms
    tl.store(bounds, student_bound)
    tl.store(scalars + SCALE, student_scale)
    tl.store(scalars + FACTOR, student_scale * LOG2E)
    tl.store(scalars + BOUND, student_bound * LOG2E)
    if TAUGHT:
        factor = student_scale
        if OWN_PRODUCT:
            factor = 1.0
        if teacher_scale is not None:
            factor = factor * tl.load(teacher_scale)
        if known_bounds is not None:
            bound = tl.load(known_bounds + 1 + teacher)
        else:
            if OWN_PRODUCT:
                bound = tl.abs(factor) * norms_product(teacher_largest, row_programs, programs)
            else:
                bound = tl.abs(factor) * student_norms
        tl.store(bounds + 1 + teacher, bound)
        tl.store(scalars + TEACHER_FACTOR, factor * LOG2E)
        tl.store(scalars + TEACHER_BOUND, bound * LOG2E)
        row_bias = 0.0
        column_bias = 0.0
        if top_row_bias is not None:
            row_bias = tl.load(top_row_bias)
        if top_column_bias is not None:
            column_bias = tl.load(top_column_bias)
        tl.store(scalars + TOP_ROW_BIAS, row_bias * LOG2E)
        tl.store(scalars + TOP_COLUMN_BIAS, column_bias * LOG2E)


class Scalars:
    """The `scalars` of a problem's passes, one after the other, and `bounds` (1 + K,) fp32 of its logits: known, or
    from the norms of its embeddings."""

    PADDED = 8  # numbers for a pass, of which tiles.py names seven: aligned

    def __init__(self, problem: Problem, known_bounds: Tensor | None) -> None:
        self.problem, self.known_bounds = problem, known_bounds
        self.scalars = problem.x.new_empty(max(1, len(problem.teachers)), self.PADDED, dtype=torch.float32)
        self.bounds = self.scalars.new_empty(1 + len(problem.teachers)) if known_bounds is None else known_bounds
        self.largest = self.scalars if known_bounds is not None else self._largest(problem.x, problem.y)

    def of(self, k: int, top_row_bias: Tensor | None, top_column_bias: Tensor | None) -> Tensor:
        """(8,) of the k-th pass, whose teacher's largest biases are given."""
        teacher = self.problem.teachers[k] if self.problem.teachers else None
        own_product = teacher is not None and teacher.source == Source.EMBEDDINGS
        teacher_largest = self.largest
        if own_product and self.known_bounds is None:
            assert teacher is not None and teacher.x is not None and teacher.y is not None
            teacher_largest = self._largest(teacher.x, teacher.y)
        row_programs, programs = self._programs()
        arguments = {
            "largest": self.largest,
            "teacher_largest": teacher_largest,
            "known_bounds": self.known_bounds,
            "scale": _fp32(self.problem.scale),
            "teacher_scale": None if teacher is None or teacher.scale is None else _fp32(teacher.scale),
            "top_row_bias": top_row_bias,
            "top_column_bias": top_column_bias,
            "scalars": self.scalars[k],
            "bounds": self.bounds,
            "row_programs": row_programs,
            "programs": programs,
            "teacher": k,
            "OWN_PRODUCT": own_product,
            "TAUGHT": teacher is not None,
        }
        Call(scalars_kernel, arguments, {})(1)
        return self.scalars[k]

    def _largest(self, x: Tensor, y: Tensor) -> Tensor:
        _, programs = self._programs()
        largest = self.scalars.new_empty(programs)
        arguments = {
            "x": x,
            "y": y,
            "width": x.shape[1],
            "largest": largest,
            "rows": self.problem.rows,
            "columns": self.problem.columns,
            "BLOCK_M": ROWS,
            "BLOCK_N": WIDTH,
        }
        for name, matrix in (("x", x), ("y", y)):
            arguments[f"{name}_stride"], arguments[f"{name}_step"] = matrix.stride()
        Call(norms_kernel, arguments, {})(programs)
        return largest

    def _programs(self) -> tuple[int, int]:
        """Of norms_kernel: for the rows, and in all."""
        of_rows = triton.cdiv(self.problem.rows, ROWS)
        return of_rows, of_rows + triton.cdiv(self.problem.columns, ROWS)


def _fp32(scale: Tensor) -> Tensor:
    return scale if scale.dtype == torch.float32 else scale.float()
