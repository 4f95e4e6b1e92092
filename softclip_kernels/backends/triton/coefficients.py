# mypy: disallow-untyped-defs=False
"""What the backward pass multiplies exponentials with: a coefficient for every row and column, computed beforehand.

    a_i = grad_row_i 2^(reference - row_lse_i),   b_j = grad_column_j 2^(reference - column_lse_j)

relative to the reference that all tiles share (softmax_backward.py), and for every FLAG_GROUP of them a flag, whether
all their powers are within fp32's range. A tile beside one that is not takes signed exponents instead. In the same
launch, the gradient at every row's positive (positive_entries.py).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...stats import Statistics, StatisticsGradient
from .call import Call, ceil_div, strides
from .passes import Pass
from .positive_entries import NO_TEACHER, positive_gradient
from .tiles import BOUND, LOG2E, TEACHER_BOUND, TOP_COLUMN_BIAS, TOP_ROW_BIAS, center

# How far the reference lies below the largest logit that the norms allow. With a_i between 2^-100 and 2^80 times the
# gradient nothing overflows, and what underflows is a probability below 2^-46.
HEADROOM = tl.constexpr(60.0)
LOWEST = tl.constexpr(-100.0)
HIGHEST = tl.constexpr(80.0)
LARGEST = tl.constexpr(3.0e38)  # stands for infinity, whose last bit must stay 0
FLAG_GROUP = tl.constexpr(16)  # rows (columns) that share a flag; divides every tile
BLOCK = 128  # rows or columns a program
WARPS = 8  # so that strided products of pairs fit in the registers

# What the backward kernel takes for each direction.
VECTORS = {
    "student_coefficient": "*fp32",
    "teacher_coefficient": "*fp32",
    "student_exponent": "*fp32",
    "teacher_exponent": "*fp32",
    "in_range": "*i8",
}
ARGUMENTS = {
    "row_statistics": "*fp32",
    "column_statistics": "*fp32",
    "row_grad": "*fp32",
    "column_grad": "*fp32",
    "scalars": "*fp32",
    "unit": "*fp32?",
    **{f"{direction}_{name}": of for direction in ("row", "column") for name, of in VECTORS.items()},
    "positive_column": "*i64?",
    "positive_logit": "*fp32",
    "positive_grad": "*fp32",
    "row_segment": "*i64?",
    "column_segment": "*i64?",
    "row_bias": "*fp32?",
    "column_bias": "*fp32?",
    "teacher_scale": "*fp32?",
    "left": "*teacher",
    "right": "*teacher",
    "left_stride": "i32 stride",
    "left_step": "i32 step",
    "right_stride": "i32 stride",
    "right_step": "i32 step",
    "width": "i32 width",
    "positive": "*fp32",
    "positive_near": "*fp32",
    "rows": "i32",
    "columns": "i32",
    "teacher": "i32",
}


@triton.jit
def coefficient(shift, log_sum_exp, grad):
    """`grad * 2^(shift - log_sum_exp)`, and where the power is in range or exactly 0 (nothing to sum); NaN is not."""
    empty = log_sum_exp == -float("inf")
    exponent = shift - log_sum_exp * LOG2E
    return tl.where(empty, 0.0, grad * tl.exp2(exponent)), empty | ((exponent > LOWEST) & (exponent < HIGHEST))


@triton.jit
def signed_exponent(log_sum_exp, grad):
    """`grad 2^(logit - log_sum_exp)` is `2^(logit - exponent)` with the sign of grad, which is the exponent's last bit:
    one vector instead of two, because the branch that reads it has hardly a register to spare."""
    exponent = tl.where(log_sum_exp == -float("inf"), float("inf"), log_sum_exp * LOG2E) - tl.log2(tl.abs(grad))
    exponent = tl.where(exponent > LARGEST, LARGEST, exponent)
    bits = exponent.to(tl.int32, bitcast=True) & -2
    return (bits | (grad < 0).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def one_direction(logits, exponent, index, inside, bias_other, other, inside_other, ALONG: tl.constexpr):
    """`grad_i 2^(logits_ij + bias_j - log_sum_exp_i)` from row i's signed exponent, or with ALONG = 0 the same down the
    columns."""
    shift = tl.expand_dims(tl.load(exponent + index, mask=inside, other=0.0), ALONG)
    if bias_other is not None:
        logits += tl.expand_dims(tl.load(bias_other + other, mask=inside_other, other=0.0) * LOG2E, 1 - ALONG)
    sign = ((shift.to(tl.int32, bitcast=True) << 31) | 0x3F800000).to(tl.float32, bitcast=True)
    return sign * tl.exp2(logits - shift)


@triton.jit
def all_in_range(in_range, start, end, BLOCK: tl.constexpr):
    """Whether every flag of positions [start, start + BLOCK) before `end` is 1; start is a multiple of FLAG_GROUP."""
    flag = start // FLAG_GROUP + tl.arange(0, BLOCK // FLAG_GROUP)
    return tl.min(tl.load(in_range + flag, mask=flag * FLAG_GROUP < end, other=1).to(tl.int32)) > 0


@triton.jit
def write_softmax(log_sum_exp, grad, shift, out_coefficient, out_exponent, index, inside, unit):
    """One softmax's coefficients and signed exponents of some positions, and whether the coefficients are of use."""
    lse = tl.load(log_sum_exp + index, mask=inside, other=-float("inf"))
    g = tl.load(grad + index, mask=inside, other=0.0)
    if unit is not None:
        g = g / tl.load(unit)
    value, usable = coefficient(shift, lse, g)
    tl.store(out_coefficient + index, value, mask=inside)
    tl.store(out_exponent + index, signed_exponent(lse, g), mask=inside)
    return usable


@triton.jit
def write_direction(
    softmaxes,
    vectors,
    scalars,
    unit,
    place,
    length,
    TOP_BIAS: tl.constexpr,
    STUDENT: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK positions of one direction, the place-th. softmaxes: (log-sum-exp, gradient, the teacher's log-sum-exp, the
    gradient of its mean logit); vectors: as VECTORS lists them. Returns the positions and which exist."""
    log_sum_exp, grad, teacher_log_sum_exp, teacher_grad = softmaxes
    student_coefficient, teacher_coefficient, student_exponent, teacher_exponent, in_range = vectors
    index = place * BLOCK + tl.arange(0, BLOCK)
    inside = index < length
    good = tl.full((BLOCK,), 1, tl.int1)
    if STUDENT:
        shift = center(tl.load(scalars + BOUND), HEADROOM)
        good &= write_softmax(log_sum_exp, grad, shift, student_coefficient, student_exponent, index, inside, unit)
    if SOURCE != NO_TEACHER:
        shift = center(tl.load(scalars + TEACHER_BOUND), HEADROOM) + tl.load(scalars + TOP_BIAS)
        good &= write_softmax(
            teacher_log_sum_exp, teacher_grad, shift, teacher_coefficient, teacher_exponent, index, inside, unit
        )
    flags = tl.min(tl.reshape(good.to(tl.int32), (BLOCK // FLAG_GROUP, FLAG_GROUP)), 1)
    flag = place * (BLOCK // FLAG_GROUP) + tl.arange(0, BLOCK // FLAG_GROUP)
    tl.store(in_range + flag, flags.to(tl.int8), mask=flag * FLAG_GROUP < length)
    return index, inside


@triton.jit(do_not_specialize=["rows", "columns", "teacher"])
def coefficients_kernel(
    row_statistics,
    column_statistics,
    row_grad,
    column_grad,
    scalars,
    unit,
    row_student_coefficient,
    row_teacher_coefficient,
    row_student_exponent,
    row_teacher_exponent,
    row_in_range,
    column_student_coefficient,
    column_teacher_coefficient,
    column_student_exponent,
    column_teacher_exponent,
    column_in_range,
    positive_column,
    positive_logit,
    positive_grad,
    row_segment,
    column_segment,
    row_bias,
    column_bias,
    teacher_scale,
    left,
    right,
    left_stride,
    left_step,
    right_stride,
    right_step,
    width,
    positive,
    positive_near,
    rows,
    columns,
    teacher,
    STUDENT: tl.constexpr,
    SOURCE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A pass's rows and columns, BLOCK of them a program. row_statistics (1 + 2K, rows) and row_grad (1 + K, rows) as
    in stats.py, likewise the columns'; `teacher`: which of the K, with SOURCE, of class Source, or NO_TEACHER.

    row_..., column_...   VECTORS, (rows,) and (columns,) fp32; in_range int8, one for FLAG_GROUP of them, 1 where all
                          coefficients are of use
    unit                  0-d: what the gradients are divided by
    positive              (rows,) fp32, the gradient at the positives, complete after the LAST pass; positive_near
                          (rows,) a part of it until then
    """
    place = tl.program_id(0)
    row_programs = tl.cdiv(rows, BLOCK)
    wide_rows, wide_columns = rows.to(tl.int64), columns.to(tl.int64)
    row_softmaxes = (
        row_statistics,
        row_grad,
        row_statistics + (1 + 2 * teacher) * wide_rows,
        row_grad + (1 + teacher) * wide_rows,
    )
    column_softmaxes = (
        column_statistics,
        column_grad,
        column_statistics + (1 + 2 * teacher) * wide_columns,
        column_grad + (1 + teacher) * wide_columns,
    )
    if place >= row_programs:
        write_direction(
            column_softmaxes,
            (
                column_student_coefficient,
                column_teacher_coefficient,
                column_student_exponent,
                column_teacher_exponent,
                column_in_range,
            ),
            scalars,
            unit,
            place - row_programs,
            columns,
            TOP_ROW_BIAS,
            STUDENT,
            SOURCE,
            BLOCK,
        )
    else:
        i, inside = write_direction(
            row_softmaxes,
            (
                row_student_coefficient,
                row_teacher_coefficient,
                row_student_exponent,
                row_teacher_exponent,
                row_in_range,
            ),
            scalars,
            unit,
            place,
            rows,
            TOP_COLUMN_BIAS,
            STUDENT,
            SOURCE,
            BLOCK,
        )
        if positive_column is not None:
            value = positive_gradient(
                row_softmaxes,
                column_softmaxes,
                (teacher_scale, (left, left_stride, left_step), (right, right_stride, right_step), width),
                (positive_column, positive_logit, positive_grad),
                (row_segment, column_segment),
                (row_bias, column_bias),
                (positive, positive_near),
                scalars,
                i,
                inside,
                columns,
                STUDENT,
                SOURCE,
                LAST,
                BLOCK,
            )
            tl.store(positive + i, value, mask=inside)


def prepare(
    launch_passes: list[Pass], statistics: Statistics, gradient: StatisticsGradient, unit: Tensor | None
) -> tuple[list[dict[str, Any]], Tensor | None]:
    """For every pass the arguments of softmax_backward_kernel that are VECTORS of the two directions; and the gradient
    at every row's positive (N,), None without positives."""
    problem = launch_passes[0].problem
    lengths = {"row": problem.rows, "column": problem.columns}
    like = statistics.rows.packed
    positive = None if problem.positive_column is None else like.new_empty(problem.rows)
    near = like.new_empty(problem.rows) if positive is not None and len(launch_passes) > 1 else positive
    shared: dict[str, Any] = {
        "row_statistics": statistics.rows.packed.contiguous(),
        "column_statistics": statistics.columns.packed.contiguous(),
        "row_grad": gradient.rows,
        "column_grad": gradient.columns,
        "unit": unit,
        "positive_logit": statistics.positive_logit,
        "positive_grad": gradient.positive_logit.contiguous(),
        "positive": like if positive is None else positive,
        "positive_near": like if near is None else near,
        "rows": problem.rows,
        "columns": problem.columns,
        "BLOCK": BLOCK,
    }
    prepared = []
    for k, launch_pass in enumerate(launch_passes):
        vectors = {
            f"{direction}_{name}": vector
            for direction, length in lengths.items()
            for name, vector in _vectors(launch_pass, length, like).items()
        }
        teacher = problem.teachers[k] if launch_pass.taught else None
        left, right = problem.x, problem.y
        if teacher is not None and teacher.x is not None and teacher.y is not None:
            left, right = teacher.x, teacher.y
        arguments = launch_pass.arguments | shared | vectors | strides(left=left, right=right)
        arguments |= {
            "teacher_scale": None if teacher is None else teacher.scale,
            "left": left,
            "right": right,
            "width": left.shape[1],
            "teacher": k,
            "STUDENT": launch_pass.student,
            "SOURCE": NO_TEACHER.value if teacher is None else int(teacher.source),
            "LAST": k == len(launch_passes) - 1,
        }
        programs = sum(ceil_div(length, BLOCK) for length in lengths.values())
        Call(coefficients_kernel, arguments, {"num_warps": WARPS})(programs)
        prepared.append(vectors)
    return prepared, positive


def _vectors(launch_pass: Pass, length: int, like: Tensor) -> dict[str, Tensor]:
    """One direction's VECTORS; of a softmax that the pass does not have, the other's, which are written and read
    nowhere."""
    coefficient, exponent = like.new_empty(length), like.new_empty(length)
    teacher_coefficient, teacher_exponent = coefficient, exponent
    if launch_pass.student and launch_pass.taught:
        teacher_coefficient, teacher_exponent = like.new_empty(length), like.new_empty(length)
    flags = like.new_empty(ceil_div(length, FLAG_GROUP.value), dtype=torch.int8)
    vectors = (coefficient, teacher_coefficient, exponent, teacher_exponent, flags)
    return dict(zip(VECTORS, vectors, strict=True))
