# mypy: disallow-untyped-defs=False
"""Forward: sums of exponentials over the rows and the columns of every tile.

For a tile of logits z (units of log 2, z = product * scale) and its teacher's logits t:

    e = 2^(z - reference)      rows: sum_j e                          columns: sum_i e
    f = 2^(t - reference_t)    rows: sum_j f u_j, sum_j f u_j product  columns: sum_i f v_i, sum_i f v_i product

with the bias weights u = 2^(column_bias - top), v = 2^(row_bias - top) from operands.py. The references are common to
the whole problem, so one exponential serves both directions and the sums of tiles simply add. A sum that left fp32's
range is recomputed by exact.py.
"""

import triton
import triton.language as tl

from .tiles import EMBEDDINGS, LOGITS, NONE, PAIRED, centre, grouped_tile, positives, product, relation, visible

# How far (72 nats) the reference lies below the largest logit that the norms allow: 2^20 entries at the top sum to less
# than 2^124, and the smallest normal exponential is 230 (159 nats) below the top.
HEADROOM = tl.constexpr(103.87)


@triton.jit
def masked(tile, at, left, segment_i, segment_j):
    """The tile with 0 where an entry does not count. left: how many rows and columns there are from the tile's corner
    on; of no use with segments."""
    left_i, left_j = left
    if segment_i is not None:
        tile = tl.where(visible(at, segment_i, segment_j), tile, 0.0)
    else:
        if (left_i < tile.shape[0]) | (left_j < tile.shape[1]):
            tl.debug_barrier()  # keeps the compiler from masking every tile instead of branching
            # Counted from the tile's corner, because positions kept until here would take registers.
            inside_i = tl.arange(0, tile.shape[0]) < left_i
            inside_j = tl.arange(0, tile.shape[1]) < left_j
            tile = tl.where(inside_i[:, None] & inside_j[None, :], tile, 0.0)
    return tile


@triton.jit
def write_sums(tile, weight_i, weight_j, out_i, out_j, at):
    """Sums along the tile's columns, each times its weight, to the pointers out_i (BLOCK_M,), and along its rows to
    out_j (BLOCK_N,). A weight of None is 1."""
    i, j, inside_i, inside_j = at
    if weight_j is not None:
        tl.store(out_i, tl.sum(tile * tl.load(weight_j + j, mask=inside_j, other=0.0)[None, :], 1), mask=inside_i)
    else:
        tl.store(out_i, tl.sum(tile, 1), mask=inside_i)
    if weight_i is not None:
        tl.store(out_j, tl.sum(tile * tl.load(weight_i + i, mask=inside_i, other=0.0)[:, None], 0), mask=inside_j)
    else:
        tl.store(out_j, tl.sum(tile, 0), mask=inside_j)


@triton.jit
def write_ranks(dot, scale, at, segment_i, segment_j, threshold_i, threshold_j, out_i, out_j):
    """How many logits of each row and column exceed its threshold; as fp32, exact up to 2^24."""
    i, j, inside_i, inside_j = at
    seen = visible(at, segment_i, segment_j)
    z = dot * scale
    above_i = seen & (z > tl.load(threshold_i + i, mask=inside_i, other=0.0)[:, None])
    tl.store(out_i, tl.sum(above_i.to(tl.float32), 1), mask=inside_i)
    above_j = seen & (z > tl.load(threshold_j + j, mask=inside_j, other=0.0)[None, :])
    tl.store(out_j, tl.sum(above_j.to(tl.float32), 0), mask=inside_j)


@triton.jit(do_not_specialize=["row_start", "row_end", "column_start", "column_end"])
def statistics_kernel(
    x,
    y,
    teacher_x,
    teacher_y,
    positive,
    row_segment,
    column_segment,
    row_threshold,
    column_threshold,
    row_weight,
    column_weight,
    scalars,
    row_sums,
    column_sums,
    mirror_row_sums,
    mirror_column_sums,
    positive_logit,
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
    STATISTICS: tl.constexpr,
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
    """One tile of the super-block of rows [row_start, row_end) and columns [column_start, column_end).

    row_sums (tile columns, STATISTICS, edge) and column_sums (tile rows, STATISTICS, edge), fp32: partial sums, one
    slot a tile, indexed within the super-block. PAIRED works on the tiles (I, J) and (J, I) together: the second's sums
    go to mirror_row_sums (tile rows, STATISTICS, edge) and mirror_column_sums (tile columns, STATISTICS, edge). On the
    diagonal some slots are left alone, so all four buffers come zeroed.

    scalars (fp32): scale; scale, and the largest |logit|, in units of log 2; the teacher's two likewise (LOGITS and
    PAIRED: its factor on the student's product); the largest row and column bias.
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
    # Positions past the end read the last row again: cheaper than a mask, and never stored.
    safe_i, safe_j = tl.minimum(i, row_end - 1), tl.minimum(j, column_end - 1)

    at = (i, j, inside_i, inside_j)
    left = (row_end - row_start - tile_m * BLOCK_M, column_end - column_start - tile_n * BLOCK_N)
    out_i = (tile_n.to(tl.int64) * STATISTICS) * edge + local_i
    out_j = (tile_m.to(tl.int64) * STATISTICS) * edge + local_j
    rank = edge * (STATISTICS - 1)  # ranks are the last statistic, the teacher's follow the student's
    teacher = edge * STUDENT

    scale = tl.load(scalars)
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

    dot = product(matrix_x, matrix_y, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
    if positive is not None:
        column = positives(positive, i, inside_i, column_start + tile_n * BLOCK_N, column_end, BLOCK_N)
        if tl.max(column) >= 0:
            own = tl.sum(tl.where(tl.arange(0, BLOCK_N)[None, :] == column[:, None], dot, 0.0), 1)
            tl.store(positive_logit + i, own * scale, mask=column >= 0)
    if row_threshold is not None:
        write_ranks(
            dot,
            scale,
            at,
            row_segment,
            column_segment,
            row_threshold,
            column_threshold,
            row_sums + out_i + rank,
            column_sums + out_j + rank,
        )
    if STUDENT:
        e = masked(tl.exp2(dot * factor - reference), at, left, row_segment, column_segment)
        write_sums(e, None, None, row_sums + out_i, column_sums + out_j, at)

    if TEACHER == PAIRED:
        # The tile (J, I), transposed: its rows' sums run down this tile. Each of the two tiles teaches the other.
        mirror = product(matrix_y, matrix_x, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
        twin_i, twin_j = i < tl.where(related > 0, row_end, 0), j < tl.where(related > 0, column_end, 0)
        twin_at = (i, j, twin_i, twin_j)
        if positive is not None:
            row = positives(positive, j, twin_j, row_start + tile_m * BLOCK_M, row_end, BLOCK_M)
            if tl.max(row) >= 0:
                own = tl.sum(tl.where(tl.arange(0, BLOCK_M)[:, None] == row[None, :], mirror, 0.0), 0)
                tl.store(positive_logit + j, own * scale, mask=row >= 0)
        if row_threshold is not None:
            write_ranks(
                mirror,
                scale,
                twin_at,
                column_segment,
                row_segment,
                column_threshold,
                row_threshold,
                mirror_column_sums + out_i + rank,
                mirror_row_sums + out_j + rank,
            )
        f = tl.exp2(dot * teacher_factor - teacher_reference)
        f = masked(f, at, left, column_segment, row_segment)
        mirror_i = mirror_column_sums + out_i + teacher
        mirror_j = mirror_row_sums + out_j + teacher
        write_sums(f, column_weight, row_weight, mirror_i, mirror_j, twin_at)
        write_sums(f * mirror, column_weight, row_weight, mirror_i + edge, mirror_j + edge, twin_at)
        e = masked(tl.exp2(mirror * factor - reference), at, left, column_segment, row_segment)
        write_sums(e, None, None, mirror_column_sums + out_i, mirror_row_sums + out_j, twin_at)
        f = tl.exp2(mirror * teacher_factor - teacher_reference)
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
        f = tl.exp2(t * teacher_factor - teacher_reference)
    elif TEACHER == LOGITS:
        f = tl.exp2(dot * teacher_factor - teacher_reference)
    if TEACHER != NONE:
        f = masked(f, at, left, row_segment, column_segment)
        teacher_i = row_sums + out_i + teacher
        teacher_j = column_sums + out_j + teacher
        write_sums(f, row_weight, column_weight, teacher_i, teacher_j, at)
        write_sums(f * dot, row_weight, column_weight, teacher_i + edge, teacher_j + edge, at)
