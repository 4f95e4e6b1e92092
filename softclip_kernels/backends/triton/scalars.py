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
from .norms import largest_squares, programs
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

AT_ONCE = tl.constexpr(1024)  # partial maxima that are reduced at once

ARGUMENTS = {
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
    """One program: a pass's `scalars`, by `known_bounds`, or by what norms_kernel found of the student's embeddings and
    of the teacher's; the student's bound and the teacher-th teacher's then go to `bounds` (1 + K,).
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
            norms = student_norms
            if OWN_PRODUCT:
                norms = norms_product(teacher_largest, row_programs, programs)
            bound = tl.abs(factor) * norms
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
        self.largest = self.scalars if known_bounds is not None else largest_squares(problem.x, problem.y)

    def of(self, k: int, top_row_bias: Tensor | None, top_column_bias: Tensor | None) -> Tensor:
        """(8,) of the k-th pass, whose teacher's largest biases are given."""
        teacher = self.problem.teachers[k] if self.problem.teachers else None
        own_product = teacher is not None and teacher.source == Source.EMBEDDINGS
        teacher_largest = self.largest
        if own_product and self.known_bounds is None:
            assert teacher is not None and teacher.x is not None and teacher.y is not None
            teacher_largest = largest_squares(teacher.x, teacher.y)
        of_rows, of_columns = programs(self.problem.rows, self.problem.columns)
        arguments = {
            "largest": self.largest,
            "teacher_largest": teacher_largest,
            "known_bounds": self.known_bounds,
            "scale": self.problem.scale,
            "teacher_scale": None if teacher is None else teacher.scale,
            "top_row_bias": top_row_bias,
            "top_column_bias": top_column_bias,
            "scalars": self.scalars[k],
            "bounds": self.bounds,
            "row_programs": of_rows,
            "programs": of_rows + of_columns,
            "teacher": k,
            "OWN_PRODUCT": own_product,
            "TAUGHT": teacher is not None,
        }
        Call(scalars_kernel, arguments, {})(1)
        return self.scalars[k]
