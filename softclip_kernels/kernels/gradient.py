# mypy: disallow-untyped-defs=False
"""Backward: a super-block of G, every entry recomputed and finished in one epilogue, for two matrix products after it.

    G_ij = grad_row_i 2^(z_ij - row_lse_i) + grad_column_j 2^(z_ij - column_lse_j) + the same of the teacher's logits

One exponential relative to a common reference serves both directions of a softmax, and both softmaxes when the teacher
is tied to the student:

    G_ij = 2^(z_ij - reference) (a_i u_j + b_j v_i),   a_i = grad_row_i 2^(reference - row_lse_i),   b_j likewise,

with the bias weights u and v. `coefficients_kernel` prepares a and b. Tiles in which a power leaves fp32's range are
overwritten by a second launch of the same kernel with one exponential a direction (EXACT), whose programs otherwise
return at once: no synchronisation with the host. Positives are left 0: the caller adds them in full precision.
"""

import triton
import triton.language as tl

from .tiles import EMBEDDINGS, LOG2E, LOGITS, NONE, PAIRED, centre, grouped_tile, positives, product, relation, visible

# How far the reference lies below the largest logit that the norms allow. With a_i between 2^-100 and 2^80 times the
# gradient nothing overflows, and what underflows is a probability below 2^-46.
HEADROOM = tl.constexpr(60.0)
LOWEST = tl.constexpr(-100.0)
HIGHEST = tl.constexpr(80.0)


@triton.jit
def coefficient(shift, log_sum_exp, grad, index, inside):
    """`grad * 2^(shift - log_sum_exp)`, and where the power is in range or exactly 0 (nothing to sum); NaN is not."""
    lse = tl.load(log_sum_exp + index, mask=inside, other=-float("inf"))
    empty = lse == -float("inf")
    exponent = shift - lse * LOG2E
    value = tl.load(grad + index, mask=inside, other=0.0) * tl.exp2(exponent)
    return tl.where(empty, 0.0, value), empty | ((exponent > LOWEST) & (exponent < HIGHEST))


@triton.jit(do_not_specialize=["length"])
def coefficients_kernel(
    log_sum_exp,
    grad,
    teacher_log_sum_exp,
    teacher_grad,
    scalars,
    own,
    taught,
    fine,
    length,
    TOP: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For one direction: the student's and the teacher's coefficients (length,) fp32, and int8 1 where both are of use.
    TOP: which of the scalars is the largest bias along the sum, 6 (column bias) for rows and 5 for columns."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < length
    good = inside
    if STUDENT:
        value, usable = coefficient(centre(tl.load(scalars + 2), HEADROOM), log_sum_exp, grad, index, inside)
        tl.store(own + index, value, mask=inside)
        good = good & usable
    if TEACHER != NONE:
        shift = centre(tl.load(scalars + 4), HEADROOM) + tl.load(scalars + TOP)
        value, usable = coefficient(shift, teacher_log_sum_exp, teacher_grad, index, inside)
        tl.store(taught + index, value, mask=inside)
        good = good & usable
    tl.store(fine + index, good.to(tl.int8), mask=inside)


@triton.jit
def one_direction(logits, log_sum_exp, grad, index, inside, bias_other, other, inside_other, ALONG: tl.constexpr):
    """`grad_i 2^(logits_ij + bias_j - log_sum_exp_i)`, or with ALONG = 0 the same down the columns."""
    lse = tl.load(log_sum_exp + index, mask=inside, other=float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse) * LOG2E
    g = tl.load(grad + index, mask=inside, other=0.0)
    if bias_other is not None:
        logits += tl.expand_dims(tl.load(bias_other + other, mask=inside_other, other=0.0) * LOG2E, 1 - ALONG)
    return tl.expand_dims(g, ALONG) * tl.exp2(logits - tl.expand_dims(lse, ALONG))


@triton.jit
def through_softmax(dot, factor, reference, rows, columns, at, EXACT: tl.constexpr):
    """The gradient (BLOCK_M, BLOCK_N) with respect to the logits `dot * factor`, through the softmax along the tile's
    columns (one a row) and the one along its rows. rows and columns: (coefficient, bias weight, log-sum-exp, gradient,
    bias), each a pointer; weights and biases, of the row's or column's own, may be None."""
    i, j, inside_i, inside_j = at
    coefficient_i, weight_i, lse_i, grad_i, bias_i = rows
    coefficient_j, weight_j, lse_j, grad_j, bias_j = columns
    if EXACT:
        logits = dot * factor
        value = one_direction(logits, lse_i, grad_i, i, inside_i, bias_j, j, inside_j, 1)
        value += one_direction(logits, lse_j, grad_j, j, inside_j, bias_i, i, inside_i, 0)
    else:
        a = tl.load(coefficient_i + i, mask=inside_i, other=0.0)[:, None]
        b = tl.load(coefficient_j + j, mask=inside_j, other=0.0)[None, :]
        if weight_j is not None:
            a = a * tl.load(weight_j + j, mask=inside_j, other=0.0)[None, :]
        if weight_i is not None:
            b = b * tl.load(weight_i + i, mask=inside_i, other=0.0)[:, None]
        value = tl.exp2(dot * factor - reference) * (a + b)
    return value


@triton.jit
def fine_tile(fine_i, fine_j, at):
    i, j, inside_i, inside_j = at
    return tl.minimum(
        tl.min(tl.load(fine_i + i, mask=inside_i, other=1).to(tl.int32)),
        tl.min(tl.load(fine_j + j, mask=inside_j, other=1).to(tl.int32)),
    )


@triton.jit(do_not_specialize=["row_start", "row_end", "column_start", "column_end"])
def gradient_kernel(
    x,
    y,
    teacher_x,
    teacher_y,
    positive,
    row_segment,
    column_segment,
    row_own,
    row_taught,
    row_fine,
    column_own,
    column_taught,
    column_fine,
    row_weight,
    column_weight,
    row_lse,
    row_grad,
    column_lse,
    column_grad,
    teacher_row_lse,
    teacher_row_grad,
    teacher_column_lse,
    teacher_column_grad,
    row_bias,
    column_bias,
    scalars,
    previous,
    g,
    mirror_g,
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
    row_start,
    row_end,
    column_start,
    column_end,
    edge,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    TIED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    TEACHER_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
):
    """One tile of G for rows [row_start, row_end) and columns [column_start, column_end).

    g (rows of the super-block, edge): the scratch, any floating dtype. previous, another of that shape in fp32 or None:
    what earlier teachers' launches left, added here. PAIRED works on the tiles (I, J) and (J, I) together: the second
    goes to mirror_g (columns of the super-block, edge), which on the diagonal is g itself. scalars as in statistics.py.
    """
    tiles_m = tl.cdiv(row_end - row_start, BLOCK_M)
    tiles_n = tl.cdiv(column_end - column_start, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP)
    if TEACHER == PAIRED:
        related = relation(row_start, column_start, tile_m, tile_n, BLOCK_M, BLOCK_N)
        if related < 0:
            return
    local_i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    local_j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i, j = row_start + local_i, column_start + local_j
    inside_i, inside_j = i < row_end, j < column_end
    at = (i, j, inside_i, inside_j)
    if EXACT:
        fine = fine_tile(row_fine, column_fine, at)
        if TEACHER == PAIRED:
            fine = tl.minimum(fine, fine_tile(column_fine, row_fine, at))
        if fine != 0:
            return

    safe_i, safe_j = tl.minimum(i, row_end - 1), tl.minimum(j, column_end - 1)
    factor = tl.load(scalars + 1)
    reference = centre(tl.load(scalars + 2), HEADROOM)
    if TIED:
        teacher_factor = factor
        teacher_reference = reference
    else:
        teacher_factor = tl.load(scalars + 3)
        teacher_reference = centre(tl.load(scalars + 4), HEADROOM)
    matrix_x = (x, x_stride, x_step)
    matrix_y = (y, y_stride, y_step)
    rows = (row_own, None, row_lse, row_grad, None)
    columns = (column_own, None, column_lse, column_grad, None)
    teacher_rows = (row_taught, row_weight, teacher_row_lse, teacher_row_grad, row_bias)
    teacher_columns = (column_taught, column_weight, teacher_column_lse, teacher_column_grad, column_bias)

    if STUDENT or TEACHER == LOGITS:
        dot = product(matrix_x, matrix_y, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
    if TEACHER == PAIRED:
        # The tile (J, I), transposed. Each of the two tiles teaches the other.
        mirror = product(matrix_y, matrix_x, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
    if STUDENT:
        value = through_softmax(dot, factor, reference, rows, columns, at, EXACT)
    else:
        value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TEACHER == LOGITS:
        value += through_softmax(dot, teacher_factor, teacher_reference, teacher_rows, teacher_columns, at, EXACT)
    elif TEACHER == EMBEDDINGS:
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
        value += through_softmax(t, teacher_factor, teacher_reference, teacher_rows, teacher_columns, at, EXACT)
    elif TEACHER == PAIRED:
        value += through_softmax(mirror, teacher_factor, teacher_reference, teacher_rows, teacher_columns, at, EXACT)
        mirror_value = through_softmax(mirror, factor, reference, columns, rows, at, EXACT)
        mirror_value += through_softmax(
            dot, teacher_factor, teacher_reference, teacher_columns, teacher_rows, at, EXACT
        )

    if positive is not None:
        column = positives(positive, i, inside_i, column_start + tile_n * BLOCK_N, column_end, BLOCK_N)
        if tl.max(column) >= 0:
            value = tl.where(tl.arange(0, BLOCK_N)[None, :] == column[:, None], 0.0, value)
    if row_segment is not None:
        value = tl.where(visible(at, row_segment, column_segment), value, 0.0)
    entry = local_i.to(tl.int64)[:, None] * edge + local_j[None, :]
    mask = inside_i[:, None] & inside_j[None, :]
    if previous is not None:
        value += tl.load(previous + entry, mask=mask, other=0.0)
    tl.store(g + entry, value.to(g.dtype.element_ty), mask=mask)

    if TEACHER == PAIRED:
        twin_j = inside_j & (related > 0)
        if positive is not None:
            row = positives(positive, j, twin_j, row_start + tile_m * BLOCK_M, row_end, BLOCK_M)
            if tl.max(row) >= 0:
                mirror_value = tl.where(tl.arange(0, BLOCK_M)[:, None] == row[None, :], 0.0, mirror_value)
        if row_segment is not None:
            mirror_value = tl.where(visible(at, column_segment, row_segment), mirror_value, 0.0)
        mirror_entry = local_j.to(tl.int64)[:, None] * edge + local_i[None, :]
        tl.store(
            mirror_g + mirror_entry,
            tl.trans(mirror_value.to(g.dtype.element_ty)),
            mask=twin_j[:, None] & inside_i[None, :],
        )
