# mypy: disallow-untyped-defs=False
"""Backward: a super-block of G, every entry recomputed and finished in one epilogue, for two matrix products after it.

    G_ij = grad_row_i 2^(z_ij - row_lse_i) + grad_column_j 2^(z_ij - column_lse_j) + the same of the teacher's logits

One exponential relative to a common reference serves both directions of a softmax, and both softmaxes when the teacher
is tied to the student:

    G_ij = 2^(z_ij - reference) (a_i u_j + b_j v_i),   a_i = grad_row_i 2^(reference - row_lse_i),   b_j likewise,

with the bias weights u and v. `coefficients_kernel` prepares a and b, and says for every FINE of them whether all
powers are within fp32's range. A tile beside one that is not takes the exact branch, an exponential a direction,
without asking the host. Positives are left 0: the caller adds them in full precision.
"""

import triton
import triton.language as tl

from .tiles import EMBEDDINGS, LOG2E, LOGITS, NONE, PAIRED, centre, grouped_tile, positives, product, relation, visible

# How far the reference lies below the largest logit that the norms allow. With a_i between 2^-100 and 2^80 times the
# gradient nothing overflows, and what underflows is a probability below 2^-46.
HEADROOM = tl.constexpr(60.0)
LOWEST = tl.constexpr(-100.0)
HIGHEST = tl.constexpr(80.0)
LARGEST = tl.constexpr(3.0e38)  # stands for infinity, whose last bit must stay 0
VECTOR_BLOCK = 1024  # entries a program of coefficients_kernel
FINE = tl.constexpr(16)  # rows (columns) that share a flag; divides every tile


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
    one vector instead of two, because the exact branch has hardly a register to spare."""
    lse = tl.load(log_sum_exp + index, mask=inside, other=-float("inf"))
    g = tl.load(grad + index, mask=inside, other=0.0)
    exponent = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E) - tl.log2(tl.abs(g))
    exponent = tl.where(exponent > LARGEST, LARGEST, exponent)
    bits = exponent.to(tl.int32, bitcast=True) & -2
    return (bits | (g < 0).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["length"])
def coefficients_kernel(
    log_sum_exp,
    grad,
    teacher_log_sum_exp,
    teacher_grad,
    scalars,
    own,
    taught,
    own_exact,
    taught_exact,
    fine,
    length,
    TOP: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For one direction: the student's and the teacher's coefficients and signed exponents (length,) fp32, and fine
    (length / FINE, rounded up) int8, 1 where all coefficients are of use. TOP: which of the scalars is the largest bias
    along the sum, 6 (column bias) for rows and 5 for columns."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < length
    good = tl.full((BLOCK,), 1, tl.int1)
    if STUDENT:
        value, usable = coefficient(centre(tl.load(scalars + 2), HEADROOM), log_sum_exp, grad, index, inside)
        tl.store(own + index, value, mask=inside)
        tl.store(own_exact + index, signed_exponent(log_sum_exp, grad, index, inside), mask=inside)
        good = good & usable
    if TEACHER != NONE:
        shift = centre(tl.load(scalars + 4), HEADROOM) + tl.load(scalars + TOP)
        value, usable = coefficient(shift, teacher_log_sum_exp, teacher_grad, index, inside)
        tl.store(taught + index, value, mask=inside)
        exact = signed_exponent(teacher_log_sum_exp, teacher_grad, index, inside)
        tl.store(taught_exact + index, exact, mask=inside)
        good = good & usable
    flags = tl.min(tl.reshape(good.to(tl.int32), (BLOCK // FINE, FINE)), 1)
    flag = tl.program_id(0) * (BLOCK // FINE) + tl.arange(0, BLOCK // FINE)
    tl.store(fine + flag, flags.to(tl.int8), mask=flag * FINE < length)


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
def through_softmax(dot, factor, reference, rows, columns, at, EXACT: tl.constexpr):
    """The gradient (BLOCK_M, BLOCK_N) with respect to the logits `dot * factor`, through the softmax along the tile's
    columns (one a row) and the one along its rows. rows and columns: (coefficient, bias weight, signed exponent, bias),
    each a pointer; weights and biases, of the row's or column's own, may be None."""
    i, j, inside_i, inside_j = at
    coefficient_i, weight_i, exponent_i, bias_i = rows
    coefficient_j, weight_j, exponent_j, bias_j = columns
    if EXACT:
        logits = dot * factor
        # Columns first: a thread holds entries of few rows and many columns, whose vectors take registers until here.
        value = one_direction(logits, exponent_j, j, inside_j, bias_i, i, inside_i, 0)
        value += one_direction(logits, exponent_i, i, inside_i, bias_j, j, inside_j, 1)
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
def both_softmaxes(dot, t, student, teacher, at, STUDENT: tl.constexpr, TEACHER: tl.constexpr, EXACT: tl.constexpr):
    """The tile of G through the softmaxes of the student on the logits dot and of the teacher on the logits t; the
    twin's as well when PAIRED, where t is the twin's dot and each of the two teaches the other. student and teacher:
    (factor, reference, rows, columns)."""
    factor, reference, rows, columns = student
    teacher_factor, teacher_reference, teacher_rows, teacher_columns = teacher
    if STUDENT:
        value = through_softmax(dot, factor, reference, rows, columns, at, EXACT)
        mirror = value
        if TEACHER == PAIRED:
            mirror = through_softmax(dot, teacher_factor, teacher_reference, teacher_columns, teacher_rows, at, EXACT)
            mirror += through_softmax(t, factor, reference, columns, rows, at, EXACT)
        if TEACHER != NONE:
            value += through_softmax(t, teacher_factor, teacher_reference, teacher_rows, teacher_columns, at, EXACT)
    else:
        value = through_softmax(t, teacher_factor, teacher_reference, teacher_rows, teacher_columns, at, EXACT)
        mirror = value
    return value, mirror


@triton.jit
def finish(dot, t, student, teacher, at, fine, STUDENT: tl.constexpr, TEACHER: tl.constexpr):
    """both_softmaxes, in the branch that the tile needs."""
    if fine:
        value, mirror = both_softmaxes(dot, t, student, teacher, at, STUDENT, TEACHER, False)
    else:
        value, mirror = both_softmaxes(dot, t, student, teacher, at, STUDENT, TEACHER, True)
    return value, mirror


@triton.jit
def all_fine(fine, start, end, BLOCK: tl.constexpr):
    """Whether every flag of positions [start, start + BLOCK) before `end` is 1; start is a multiple of FINE."""
    flag = start // FINE + tl.arange(0, BLOCK // FINE)
    return tl.min(tl.load(fine + flag, mask=flag * FINE < end, other=1).to(tl.int32)) > 0


@triton.jit
def store(pointers, tile, whole, mask):
    """Without a mask where the tile is whole: 16 bytes at a time instead of an entry."""
    tile = tile.to(pointers.dtype.element_ty)
    if whole:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=mask)


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
    row_own_exact,
    row_taught_exact,
    column_own_exact,
    column_taught_exact,
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
    first_i, first_j = row_start + tile_m * BLOCK_M, column_start + tile_n * BLOCK_N
    whole = (first_i + BLOCK_M <= row_end) & (first_j + BLOCK_N <= column_end)
    fine = all_fine(row_fine, first_i, row_end, BLOCK_M) & all_fine(column_fine, first_j, column_end, BLOCK_N)
    if TEACHER == PAIRED:
        fine &= all_fine(column_fine, first_i, row_end, BLOCK_M) & all_fine(row_fine, first_j, column_end, BLOCK_N)

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
    student = (
        factor,
        reference,
        (row_own, None, row_own_exact, None),
        (column_own, None, column_own_exact, None),
    )
    teacher = (
        teacher_factor,
        teacher_reference,
        (row_taught, row_weight, row_taught_exact, row_bias),
        (column_taught, column_weight, column_taught_exact, column_bias),
    )

    if STUDENT or TEACHER == LOGITS:
        dot = product(matrix_x, matrix_y, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
    if TEACHER == EMBEDDINGS:
        # The student's part is finished first: a second tile of logits takes the registers of the first.
        if STUDENT:
            own, _ = finish(dot, dot, student, teacher, at, fine, True, NONE)
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
        value, _ = finish(t, t, student, teacher, at, fine, False, EMBEDDINGS)
        if STUDENT:
            value += own
    else:
        t = dot
        if TEACHER == PAIRED:  # the tile (J, I), transposed
            t = product(matrix_y, matrix_x, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
        value, mirror_value = finish(dot, t, student, teacher, at, fine, STUDENT, TEACHER)

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
    store(g + entry, value, whole, mask)

    if TEACHER == PAIRED:
        twin_j = j < tl.where(related > 0, column_end, 0)
        if positive is not None:
            row = positives(positive, j, twin_j, row_start + tile_m * BLOCK_M, row_end, BLOCK_M)
            if tl.max(row) >= 0:
                mirror_value = tl.where(tl.arange(0, BLOCK_M)[:, None] == row[None, :], 0.0, mirror_value)
        if row_segment is not None:
            mirror_value = tl.where(visible(at, column_segment, row_segment), mirror_value, 0.0)
        mirror_entry = local_j.to(tl.int64)[:, None] * edge + local_i[None, :]
        mask = twin_j[:, None] & inside_i[None, :]
        store(mirror_g + mirror_entry, tl.trans(mirror_value), whole & (related > 0), mask)
