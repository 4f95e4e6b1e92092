# mypy: disallow-untyped-defs=False
"""The forward pass where the centered sums of softmax_forward.py left fp32's range: the online softmax, which keeps a
running maximum for every row.

Rows far below the largest logit that the norms allow (large scales, opposite or wildly scaled embeddings, everything
excluded) come here. A program whose rows are all in range returns at once, so the usual cost is one empty launch and no
synchronization with the host. Columns are the same with the operands exchanged.
"""

from typing import Any

import triton
import triton.language as tl

from . import launch
from .call import Call, ceil_div
from .passes import Pass
from .tiles import (
    EMBEDDINGS,
    FACTOR,
    LAYOUT,
    LN2,
    LOG2E,
    MATRICES,
    NONE,
    SCALE,
    TEACHER_FACTOR,
    product,
    visible,
)

ARGUMENTS = {
    **MATRICES,
    "row_segment": "*i64?",
    "column_segment": "*i64?",
    "row_bias": "*fp32?",
    "column_bias": "*fp32?",
    "scalars": "*fp32",
    "row_in_range": "*i8",
    "column_in_range": "*i8",
    "row_statistics": "*fp32",
    "column_statistics": "*fp32",
    **LAYOUT,
    "rows": "i32",
    "columns": "i32",
    "teacher": "i32",
}


@triton.jit
def either(first, a, b):
    """The matrix a where `first` holds, else b: (pointer, stride, step)."""
    a_pointer, a_stride, a_step = a
    b_pointer, b_stride, b_step = b
    return tl.where(first, a_pointer, b_pointer), tl.where(first, a_stride, b_stride), tl.where(first, a_step, b_step)


@triton.jit
def add_tile(total, mean, top, logits, z):
    """One more tile of logits (units of log 2) for the running maximum, sum of powers and sum of powers times z."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    powers = tl.exp2(logits - shift[:, None])
    rescale = tl.exp2(top - shift)
    return total * rescale + tl.sum(powers, 1), mean * rescale + tl.sum(powers * z, 1), new_top


@triton.jit(do_not_specialize=["rows", "columns", "teacher"])
def online_kernel(
    x,
    y,
    teacher_x,
    teacher_y,
    row_segment,
    column_segment,
    row_bias,
    column_bias,
    scalars,
    row_in_range,
    column_in_range,
    row_statistics,
    column_statistics,
    x_stride,
    x_step,
    y_stride,
    y_step,
    teacher_x_stride,
    teacher_x_step,
    teacher_y_stride,
    teacher_y_step,
    width,
    teacher_width,
    rows,
    columns,
    teacher,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    TEACHER_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
):
    """BLOCK_M rows against every column; after them the columns, BLOCK_M against every row. row_in_range (rows,) int8
    is 0 for the rows to recompute: their row_statistics (1 + 2K, rows) are overwritten, the student's, and those of the
    teacher-th teacher; likewise of the columns. TEACHER: NONE, LOGITS or EMBEDDINGS."""
    row_programs = tl.cdiv(rows, BLOCK_M)
    by_row = tl.program_id(0) < row_programs
    own_length = tl.where(by_row, rows, columns)
    i = (tl.program_id(0) - tl.where(by_row, 0, row_programs)) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_i = i < own_length
    wanted = tl.load(tl.where(by_row, row_in_range, column_in_range) + i, mask=inside_i, other=1) == 0
    if tl.max(wanted.to(tl.int32)) == 0:
        return
    length = tl.where(by_row, columns, rows)  # from here on i runs along the own side, j along the other one
    matrix_x, matrix_y = (x, x_stride, x_step), (y, y_stride, y_step)
    teacher_matrix_x = (teacher_x, teacher_x_stride, teacher_x_step)
    teacher_matrix_y = (teacher_y, teacher_y_stride, teacher_y_step)
    segment_i = row_segment
    segment_j = column_segment
    if row_segment is not None:
        segment_i = tl.where(by_row, row_segment, column_segment)
        segment_j = tl.where(by_row, column_segment, row_segment)
    statistics = tl.where(by_row, row_statistics, column_statistics) + i
    safe_i = tl.minimum(i, own_length - 1)
    scale = tl.load(scalars + SCALE)
    factor = tl.load(scalars + FACTOR)
    teacher_factor = tl.load(scalars + TEACHER_FACTOR)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    teacher_top = top
    teacher_total = total
    mean = total
    for start in range(0, length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside_j = j < length
        safe_j = tl.minimum(j, length - 1)
        seen = visible((i, j, inside_i, inside_j), segment_i, segment_j)
        dot = product(
            either(by_row, matrix_x, matrix_y),
            either(by_row, matrix_y, matrix_x),
            safe_i,
            safe_j,
            width,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            EVEN,
            PRECISION,
        )
        z = dot * scale
        if STUDENT:
            total, _, top = add_tile(total, total, top, tl.where(seen, dot * factor, -float("inf")), z)
        if TEACHER != NONE:
            if TEACHER == EMBEDDINGS:
                t = product(
                    either(by_row, teacher_matrix_x, teacher_matrix_y),
                    either(by_row, teacher_matrix_y, teacher_matrix_x),
                    safe_i,
                    safe_j,
                    teacher_width,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    TEACHER_EVEN,
                    TEACHER_PRECISION,
                )
            else:
                t = dot
            t = t * teacher_factor
            if column_bias is not None:
                t += tl.load(column_bias + j, mask=inside_j & by_row, other=0.0)[None, :] * LOG2E
            if row_bias is not None:
                t += tl.load(row_bias + j, mask=inside_j & (by_row == 0), other=0.0)[None, :] * LOG2E
            t = tl.where(seen, t, -float("inf"))
            teacher_total, mean, teacher_top = add_tile(teacher_total, mean, teacher_top, t, z)
    if STUDENT:
        tl.store(statistics, (top + tl.log2(total)) * LN2, mask=wanted)
    if TEACHER != NONE:
        statistics += (1 + 2 * teacher.to(tl.int64)) * own_length
        tl.store(statistics, (teacher_top + tl.log2(teacher_total)) * LN2, mask=wanted)
        # Nothing to average where everything is excluded.
        tl.store(statistics + own_length, mean / tl.where(teacher_total == 0.0, 1.0, teacher_total), mask=wanted)


def recompute(launch_pass: Pass, results: dict[str, Any]) -> None:
    """Overwrites in `results`, arguments of sums_kernel, the statistics of the student and of a teacher at the rows and
    columns that are not in range."""
    launch_pass = launch_pass.unmirrored()
    problem, shape = launch_pass.problem, launch.candidates("online", launch_pass)[0]
    lengths = {"rows": problem.rows, "columns": problem.columns}
    arguments = launch_pass.arguments | launch.constants(launch_pass, shape) | results | lengths
    programs = sum(ceil_div(length, shape.block_m) for length in lengths.values())
    Call(online_kernel, arguments, shape.options())(programs)
