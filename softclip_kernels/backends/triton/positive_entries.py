# mypy: disallow-untyped-defs=False
"""The gradient at every row's positive, the one entry of G that never passes through 16 bits: `positives.gradient` as a
part of coefficients_kernel, in the same terms and the same order.
"""

import triton
import triton.language as tl

from ...problem import Source
from .tiles import SCALE

NO_TEACHER = tl.constexpr(-1)
EMBEDDINGS = tl.constexpr(int(Source.EMBEDDINGS))
TRANSPOSED = tl.constexpr(int(Source.TRANSPOSED))

LOG_HALF = tl.constexpr(-0.6931471805599453)  # a probability above one half is near 1
BLOCK_D = tl.constexpr(32)


@triton.jit
def exp_minus_1(x):
    """`exp(x) - 1` for x <= 0, or a little above it, to fp32's last bits: by h (h + 2) from h = exp(x / 2) - 1, which
    Taylor's polynomial gives for |x / 2| below 0.35."""
    half = x * 0.5
    h = 1.0 / 40320.0
    h = h * half + 1.0 / 5040.0
    h = h * half + 1.0 / 720.0
    h = h * half + 1.0 / 120.0
    h = h * half + 1.0 / 24.0
    h = h * half + 1.0 / 6.0
    h = h * half + 0.5
    h = (h * half + 1.0) * half
    return tl.where(tl.abs(x) < 0.7, h * (h + 2.0), tl.exp(x) - 1.0)


@triton.jit
def add_probability(near, exact, factor, logit, log_sum_exp, seen):
    """`factor * exp(logit - log_sum_exp)`, whose 1 where the probability is near it goes to `near` and whose rest to
    `exact`."""
    nothing = (logit == -float("inf")) | (seen == 0)
    log_probability = tl.where(nothing, -float("inf"), logit - log_sum_exp)
    is_near = log_probability > LOG_HALF
    rest = tl.where(is_near, exp_minus_1(log_probability), tl.exp(log_probability))
    return near + tl.where(is_near, factor, 0.0), exact + factor * rest


@triton.jit
def pair_dot(left, right, i, j, inside, width, BLOCK: tl.constexpr):
    """`left[i] · right[j]`, (BLOCK,) fp32; left and right are (pointer, stride of rows, stride along the width)."""
    left_pointer, left_stride, left_step = left
    right_pointer, right_stride, right_step = right
    a = left_pointer + i.to(tl.int64)[:, None] * left_stride
    b = right_pointer + j.to(tl.int64)[:, None] * right_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask = inside[:, None] & (d < width)
        product = tl.load(a + d * left_step, mask=mask, other=0.0).to(tl.float32)
        product *= tl.load(b + d * right_step, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(product, 1)
    return total


@triton.jit
def teacher_logit(z, at, scalars, teacher, SOURCE: tl.constexpr, BLOCK: tl.constexpr):
    """The teacher's logit without biases at (rows, columns, which count), where the student's is z. teacher: (its scale
    or None, left, right, width), the operands of pair_dot: its embeddings, with TRANSPOSED the student's."""
    i, p, inside = at
    teacher_scale, left, right, width = teacher
    t = z
    if SOURCE == EMBEDDINGS:
        t = pair_dot(left, right, i, p, inside, width, BLOCK)
    elif SOURCE == TRANSPOSED:  # noqa: SIM102, a constant and a condition
        # As a difference, so that a positive on the diagonal has bit for bit the student's logit.
        if tl.max((inside & (i != p)).to(tl.int32)) > 0:
            mirror = pair_dot(left, right, p, i, inside, width, BLOCK)
            t = z + tl.load(scalars + SCALE) * (mirror - pair_dot(left, right, i, p, inside, width, BLOCK))
    if teacher_scale is not None:
        t = t * tl.load(teacher_scale)
    return t


@triton.jit
def positive_gradient(
    rows,
    columns,
    teacher,
    positives,
    segments,
    biases,
    sums,
    scalars,
    i,
    inside,
    column_count,
    STUDENT: tl.constexpr,
    SOURCE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds this pass's share of ∂loss/∂z at the positives of rows i to `sums`, (the total, its part near 1), which the
    first pass, the student's, begins and the last completes: (N,) fp32, 0 where the positive is in another block.

    rows, columns   (log-sum-exp, gradient, teacher's log-sum-exp, gradient of its mean logit) of each direction
    teacher         as teacher_logit takes it
    positives       (column, logit, incoming gradient) of each row's positive
    """
    row_lse, row_grad, row_teacher_lse, row_teacher_grad = rows
    column_lse, column_grad, column_teacher_lse, column_teacher_grad = columns
    positive_column, positive_logit, positive_grad = positives
    row_segment, column_segment = segments
    row_bias, column_bias = biases
    total, near_one = sums
    p = tl.load(positive_column + i, mask=inside, other=-1)
    inside = inside & (p >= 0) & (p < column_count)
    p = tl.where(inside, p, 0)
    z = tl.load(positive_logit + i, mask=inside, other=0.0)
    seen = inside
    if row_segment is not None:
        of_row = tl.load(row_segment + i, mask=inside, other=0)
        seen = seen & (of_row == tl.load(column_segment + p, mask=inside, other=0))
    if STUDENT:
        near = tl.load(positive_grad + i, mask=inside, other=0.0)
        exact = tl.zeros((BLOCK,), tl.float32)
        factor = tl.load(row_grad + i, mask=inside, other=0.0)
        near, exact = add_probability(near, exact, factor, z, tl.load(row_lse + i, mask=inside, other=0.0), seen)
        factor = tl.load(column_grad + p, mask=inside, other=0.0)
        near, exact = add_probability(near, exact, factor, z, tl.load(column_lse + p, mask=inside, other=0.0), seen)
    else:
        near = tl.load(near_one + i, mask=inside, other=0.0)
        exact = tl.load(total + i, mask=inside, other=0.0)
    if SOURCE != NO_TEACHER:
        t = teacher_logit(z, (i, p, inside), scalars, teacher, SOURCE, BLOCK)
        row_logit = t
        column_logit = t
        if column_bias is not None:
            row_logit += tl.load(column_bias + p, mask=inside, other=0.0)
        if row_bias is not None:
            column_logit += tl.load(row_bias + i, mask=inside, other=0.0)
        factor = tl.load(row_teacher_grad + i, mask=inside, other=0.0)
        lse = tl.load(row_teacher_lse + i, mask=inside, other=0.0)
        near, exact = add_probability(near, exact, factor, row_logit, lse, seen)
        factor = tl.load(column_teacher_grad + p, mask=inside, other=0.0)
        lse = tl.load(column_teacher_lse + p, mask=inside, other=0.0)
        near, exact = add_probability(near, exact, factor, column_logit, lse, seen)
    if LAST:
        exact = tl.where(inside, near + exact, 0.0)
    else:
        tl.store(near_one + i, near, mask=inside)
    return exact
