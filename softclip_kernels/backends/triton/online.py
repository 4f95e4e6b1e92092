# mypy: disallow-untyped-defs=False
"""The forward pass where the centered sums of softmax_forward.py left fp32's range: the online softmax, which keeps a
running maximum for every row.

Rows far below the largest logit that the norms allow (large scales, opposite or wildly scaled embeddings, everything
excluded) come here. A program whose rows are all in range returns at once, so the usual cost is one empty launch a
direction and no synchronization with the host. Columns are the same with the operands exchanged.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...stats import SoftmaxStatistics
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
    "column_bias": "*fp32?",
    "scalars": "*fp32",
    "in_range": "*i8",
    "log_sum_exp": "*fp32",
    "teacher_log_sum_exp": "*fp32",
    "teacher_mean": "*fp32",
    **LAYOUT,
    "rows": "i32",
    "columns": "i32",
}


@triton.jit
def add_tile(total, mean, top, logits, z):
    """One more tile of logits (units of log 2) for the running maximum, sum of powers and sum of powers times z."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    powers = tl.exp2(logits - shift[:, None])
    rescale = tl.exp2(top - shift)
    return total * rescale + tl.sum(powers, 1), mean * rescale + tl.sum(powers * z, 1), new_top


@triton.jit(do_not_specialize=["rows", "columns"])
def online_rows_kernel(
    x,
    y,
    teacher_x,
    teacher_y,
    row_segment,
    column_segment,
    column_bias,
    scalars,
    in_range,
    log_sum_exp,
    teacher_log_sum_exp,
    teacher_mean,
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
    """BLOCK_M rows against every column. in_range (rows,) int8 is 0 for the rows to recompute: log_sum_exp (rows,) and
    the teacher's two (rows,) are overwritten there. TEACHER: NONE, LOGITS or EMBEDDINGS."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_i = i < rows
    wanted = tl.load(in_range + i, mask=inside_i, other=1) == 0
    if tl.max(wanted.to(tl.int32)) == 0:
        return
    safe_i = tl.minimum(i, rows - 1)
    scale = tl.load(scalars + SCALE)
    factor = tl.load(scalars + FACTOR)
    teacher_factor = tl.load(scalars + TEACHER_FACTOR)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    teacher_top = top
    teacher_total = total
    mean = total
    for start in range(0, columns, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside_j = j < columns
        safe_j = tl.minimum(j, columns - 1)
        seen = visible((i, j, inside_i, inside_j), row_segment, column_segment)
        dot = product(
            (x, x_stride, x_step),
            (y, y_stride, y_step),
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
                    (teacher_x, teacher_x_stride, teacher_x_step),
                    (teacher_y, teacher_y_stride, teacher_y_step),
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
                t += tl.load(column_bias + j, mask=inside_j, other=0.0)[None, :] * LOG2E
            t = tl.where(seen, t, -float("inf"))
            teacher_total, mean, teacher_top = add_tile(teacher_total, mean, teacher_top, t, z)
    if STUDENT:
        tl.store(log_sum_exp + i, (top + tl.log2(total)) * LN2, mask=wanted)
    if TEACHER != NONE:
        tl.store(teacher_log_sum_exp + i, (teacher_top + tl.log2(teacher_total)) * LN2, mask=wanted)
        # Nothing to average where everything is excluded.
        tl.store(teacher_mean + i, mean / tl.where(teacher_total == 0.0, 1.0, teacher_total), mask=wanted)


def recompute(launch_pass: Pass, in_range: Tensor, statistics: SoftmaxStatistics, k: int) -> None:
    """Overwrites the statistics of the student and of teacher k at the rows where in_range (N,) int8 is 0."""
    launch_pass = launch_pass.unmirrored()
    rows, columns = launch_pass.problem.rows, launch_pass.problem.columns
    shape = launch.candidates("online", launch_pass)[0]
    # Without a teacher its arguments are written nowhere.
    taught = launch_pass.taught
    arguments = launch_pass.arguments() | launch.constants(launch_pass, shape)
    arguments |= {
        "in_range": in_range,
        "log_sum_exp": statistics.lse,
        "teacher_log_sum_exp": statistics.teacher_lse[k] if taught else statistics.lse,
        "teacher_mean": statistics.teacher_mean[k] if taught else statistics.lse,
        "rows": rows,
        "columns": columns,
    }
    Call(online_rows_kernel, arguments, shape.options())(ceil_div(rows, shape.block_m))
