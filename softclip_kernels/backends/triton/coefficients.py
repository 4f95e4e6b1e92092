# mypy: disallow-untyped-defs=False
"""What the backward pass multiplies exponentials with: a coefficient for every row and column, computed beforehand.

    a_i = grad_row_i 2^(reference - row_lse_i),   b_j = grad_column_j 2^(reference - column_lse_j)

relative to the reference that all tiles share (softmax_backward.py), and for every FLAG_GROUP of them a flag, whether
all their powers are within fp32's range. A tile beside one that is not takes signed exponents instead.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...stats import SoftmaxStatistics
from . import launch
from .passes import Pass
from .tiles import BOUND, LOG2E, NONE, TEACHER_BOUND, TOP_COLUMN_BIAS, TOP_ROW_BIAS, center

# How far the reference lies below the largest logit that the norms allow. With a_i between 2^-100 and 2^80 times the
# gradient nothing overflows, and what underflows is a probability below 2^-46.
HEADROOM = tl.constexpr(60.0)
LOWEST = tl.constexpr(-100.0)
HIGHEST = tl.constexpr(80.0)
LARGEST = tl.constexpr(3.0e38)  # stands for infinity, whose last bit must stay 0
FLAG_GROUP = tl.constexpr(16)  # rows (columns) that share a flag; divides every tile
BLOCK = 1024  # entries a program

ARGUMENTS = {
    "log_sum_exp": "*fp32",
    "grad": "*fp32",
    "teacher_log_sum_exp": "*fp32",
    "teacher_grad": "*fp32",
    "scalars": "*fp32",
    "student_coefficient": "*fp32",
    "teacher_coefficient": "*fp32",
    "student_exponent": "*fp32",
    "teacher_exponent": "*fp32",
    "in_range": "*i8",
    "length": "i32",
}


@triton.jit
def coefficient(shift, log_sum_exp, grad, index, inside):
    """`grad * 2^(shift - log_sum_exp)`, and where the power is in range or exactly 0 (nothing to sum); NaN is not."""
    lse = tl.load(log_sum_exp + index, mask=inside, other=-float("inf"))
    empty = lse == -float("inf")
    exponent = shift - lse * LOG2E
    value = tl.load(grad + index, mask=inside, other=0.0) * tl.exp2(exponent)
    return tl.where(empty, 0.0, value), empty | ((exponent > LOWEST) & (exponent < HIGHEST))


@triton.jit
def signed_exponent(log_sum_exp, grad, index, inside):
    """`grad 2^(logit - log_sum_exp)` is `2^(logit - exponent)` with the sign of grad, which is the exponent's last bit:
    one vector instead of two, because the branch that reads it has hardly a register to spare."""
    lse = tl.load(log_sum_exp + index, mask=inside, other=-float("inf"))
    g = tl.load(grad + index, mask=inside, other=0.0)
    exponent = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E) - tl.log2(tl.abs(g))
    exponent = tl.where(exponent > LARGEST, LARGEST, exponent)
    bits = exponent.to(tl.int32, bitcast=True) & -2
    return (bits | (g < 0).to(tl.int32)).to(tl.float32, bitcast=True)


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


@triton.jit(do_not_specialize=["length"])
def coefficients_kernel(
    log_sum_exp,
    grad,
    teacher_log_sum_exp,
    teacher_grad,
    scalars,
    student_coefficient,
    teacher_coefficient,
    student_exponent,
    teacher_exponent,
    in_range,
    length,
    TOP_BIAS: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For one direction: the student's and the teacher's coefficients and signed exponents (length,) fp32, and in_range
    (length / FLAG_GROUP, rounded up) int8, 1 where all coefficients are of use. TOP_BIAS: the place of the largest bias
    along the sum, TOP_COLUMN_BIAS for rows and TOP_ROW_BIAS for columns."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < length
    good = tl.full((BLOCK,), 1, tl.int1)
    if STUDENT:
        value, usable = coefficient(center(tl.load(scalars + BOUND), HEADROOM), log_sum_exp, grad, index, inside)
        tl.store(student_coefficient + index, value, mask=inside)
        tl.store(student_exponent + index, signed_exponent(log_sum_exp, grad, index, inside), mask=inside)
        good = good & usable
    if TEACHER != NONE:
        shift = center(tl.load(scalars + TEACHER_BOUND), HEADROOM) + tl.load(scalars + TOP_BIAS)
        value, usable = coefficient(shift, teacher_log_sum_exp, teacher_grad, index, inside)
        tl.store(teacher_coefficient + index, value, mask=inside)
        exponent = signed_exponent(teacher_log_sum_exp, teacher_grad, index, inside)
        tl.store(teacher_exponent + index, exponent, mask=inside)
        good = good & usable
    flags = tl.min(tl.reshape(good.to(tl.int32), (BLOCK // FLAG_GROUP, FLAG_GROUP)), 1)
    flag = tl.program_id(0) * (BLOCK // FLAG_GROUP) + tl.arange(0, BLOCK // FLAG_GROUP)
    tl.store(in_range + flag, flags.to(tl.int8), mask=flag * FLAG_GROUP < length)


def prepare(launch_pass: Pass, k: int, direction: str, statistics: SoftmaxStatistics, grad: Tensor) -> dict[str, Any]:
    """The arguments of softmax_backward_kernel for a `direction`, "row" or "column", of the pass that holds teacher k;
    from the direction's statistics and the gradients (1 + K, L) with respect to them."""
    length, device = len(statistics.lse), statistics.lse.device
    # Without a teacher its arguments are read nowhere.
    teacher_log_sum_exp, teacher_grad = statistics.lse, grad[0]
    if launch_pass.taught:
        teacher_log_sum_exp, teacher_grad = statistics.teacher_lse[k], grad[1 + k]
    prepared = {
        name: torch.empty(length, dtype=torch.float32, device=device)
        for name in ("student_coefficient", "teacher_coefficient", "student_exponent", "teacher_exponent")
    }
    flags = triton.cdiv(length, FLAG_GROUP.value)
    prepared["in_range"] = torch.empty(flags, dtype=torch.int8, device=device)
    arguments: dict[str, Any] = {
        "log_sum_exp": statistics.lse.contiguous(),
        "grad": grad[0],
        "teacher_log_sum_exp": teacher_log_sum_exp.contiguous(),
        "teacher_grad": teacher_grad,
        "scalars": launch_pass.scalars,
        **prepared,
        "length": length,
        "TOP_BIAS": {"row": TOP_COLUMN_BIAS, "column": TOP_ROW_BIAS}[direction].value,
        "STUDENT": launch_pass.student,
        "TEACHER": launch_pass.mode,
        "BLOCK": BLOCK,
    }
    launch.Call(coefficients_kernel, arguments, {})(triton.cdiv(length, BLOCK))
    return {f"{direction}_{name}": vector for name, vector in prepared.items()}
