# mypy: disallow-untyped-defs=False
"""The numbers of a launch that are known on the device alone, `scalars` as tiles.py lists them: above all a bound of
the logits, from the largest norms of rows and columns, by which the references of exponentials are chosen.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ...stats import SCALARS
from .call import Call
from .norms import largest_squares, programs
from .tiles import (
    ALL_SCALARS,
    BOUND,
    FACTOR,
    LOG2E,
    SCALE,
    TEACHER_BOUND,
    TEACHER_FACTOR,
    TOP_COLUMN_BIAS,
    TOP_ROW_BIAS,
)

AT_ONCE = tl.constexpr(1024)  # partial maxima that are reduced at once

ARGUMENTS = {
    "largest": "*fp32",
    "teacher_largest": "*fp32",
    "scale": "*fp32",
    "teacher_scale": "*fp32?",
    "top_row_bias": "*fp32?",
    "top_column_bias": "*fp32?",
    "scalars": "*fp32",
    "row_programs": "i32",
    "programs": "i32",
}


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


@triton.jit(do_not_specialize=["row_programs", "programs"])
def scalars_kernel(
    largest,
    teacher_largest,
    scale,
    teacher_scale,
    top_row_bias,
    top_column_bias,
    scalars,
    row_programs,
    programs,
    OWN_PRODUCT: tl.constexpr,
    TAUGHT: tl.constexpr,
):
    """One program: a pass's `scalars`, by what norms_kernel found of the student's embeddings and of the teacher's.
    OWN_PRODUCT: the teacher's logits are a product of its own, not the student's times a ratio."""
    student_scale = tl.load(scale)
    norms = norms_product(largest, row_programs, programs)
    tl.store(scalars + SCALE, student_scale)
    tl.store(scalars + FACTOR, student_scale * LOG2E)
    tl.store(scalars + BOUND, tl.abs(student_scale) * norms * LOG2E)
    if TAUGHT:
        factor = student_scale
        if OWN_PRODUCT:
            factor = 1.0
            norms = norms_product(teacher_largest, row_programs, programs)
        if teacher_scale is not None:
            factor = factor * tl.load(teacher_scale)
        bound = tl.abs(factor) * norms
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
    for unused in tl.static_range(TOP_COLUMN_BIAS + 1 if TAUGHT else TEACHER_FACTOR, ALL_SCALARS):
        tl.store(scalars + unused, 0.0)


def scalars(
    problem: Problem, top_biases: Sequence[tuple[Tensor | None, Tensor | None]], zeroed: Tensor | None = None
) -> Tensor:
    """(max(1, K), 8) fp32: of each pass, whose teacher's largest row bias and column bias are given. `zeroed`: as
    largest_squares takes it."""
    passes = max(1, len(problem.teachers))
    numbers = problem.x.new_empty(passes, SCALARS, dtype=torch.float32)
    largest = largest_squares(problem.x, problem.y, zeroed)
    of_rows, of_columns = programs(problem.rows, problem.columns)
    for k in range(passes):
        teacher = problem.teachers[k] if problem.teachers else None
        teacher_largest = None
        if teacher is not None and teacher.x is not None and teacher.y is not None:
            teacher_largest = largest_squares(teacher.x, teacher.y)
        top_row_bias, top_column_bias = top_biases[k]
        arguments = {
            "largest": largest,
            "teacher_largest": largest if teacher_largest is None else teacher_largest,
            "scale": problem.scale,
            "teacher_scale": None if teacher is None else teacher.scale,
            "top_row_bias": top_row_bias,
            "top_column_bias": top_column_bias,
            "scalars": numbers[k],
            "row_programs": of_rows,
            "programs": of_rows + of_columns,
            "OWN_PRODUCT": teacher_largest is not None,
            "TAUGHT": teacher is not None,
        }
        Call(scalars_kernel, arguments, {})(1)
    return numbers
