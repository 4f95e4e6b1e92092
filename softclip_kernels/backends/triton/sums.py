# mypy: disallow-untyped-defs=False
"""What the forward kernel's partial sums become: the sums of all super-blocks so far, and with the last super-block of
a range of rows (columns) their statistics.

    lse = ln 2 (reference + log2 sum e),   teacher's lse likewise,   mean = scale sum (f product) / sum f

All directions of a super-block, and its mirror's, in one launch; slots are added in a fixed order.
"""

import triton
import triton.language as tl

from .tiles import (
    BOUND,
    LN2,
    SCALE,
    SUPER_BLOCK,
    TEACHER_BOUND,
    TOP_COLUMN_BIAS,
    TOP_ROW_BIAS,
    center,
)

# How far (72 nats) the reference lies below the largest logit that the norms allow: 2^20 entries at the top sum to less
# than 2^124, and the smallest normal exponential is 230 (159 nats) below the top.
HEADROOM = tl.constexpr(103.87)
# Exponentials below fp32's smallest normal number vanish. All of them together are below half an ulp of a sum that is
# at least this for each of them.
SMALLEST = tl.constexpr(2.0**-102)
BLOCK = 64  # positions a program
SLOTS = tl.constexpr(32)  # that are added at once

ARGUMENTS = {
    "row_sums": "*fp32",
    "column_sums": "*fp32",
    "mirror_row_sums": "*fp32",
    "mirror_column_sums": "*fp32",
    "row_totals": "*fp32",
    "column_totals": "*fp32",
    "row_statistics": "*fp32",
    "column_statistics": "*fp32",
    "row_in_range": "*i8",
    "column_in_range": "*i8",
    "row_ranks": "*i64?",
    "column_ranks": "*i64?",
    "scalars": "*fp32",
    **SUPER_BLOCK,
    "rows": "i32",
    "columns": "i32",
    "teacher": "i32",
}


@triton.jit
def slot_sum(slots, which, local, inside, edge, STATISTICS: tl.constexpr, MIRRORED: tl.constexpr, BLOCK: tl.constexpr):
    """Of one statistic, the sum over the slots at the local positions. slots: (pointer (count, STATISTICS, edge),
    count, written); written, of use with MIRRORED: (whether the super-block is on the diagonal, where a position's
    slots are filled only of groups of tiles that are `least` or more beyond its own; least; slots a group; positions a
    group; 1 or -1, the direction)."""
    pointer, count, written = slots
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        mask = (slot < count)[:, None] & inside[None, :]
        if MIRRORED:
            on_diagonal, least, slot_groups, position_groups, beyond = written
            distance = (slot // slot_groups)[:, None] - (local // position_groups)[None, :]
            mask &= (distance * beyond >= least) | (on_diagonal == 0)
        place = (slot.to(tl.int64) * STATISTICS + which)[:, None] * edge + local[None, :]
        total += tl.sum(tl.load(pointer + place, mask=mask, other=0.0), 0)
    return total


@triton.jit
def log_sum_exp(total, reference, number):
    """And whether the sum, of a `number` of exponentials, is in range."""
    return (reference + tl.log2(total)) * LN2, (total >= number * SMALLEST) & (total < float("inf"))


@triton.jit
def finish_direction(
    sums,
    statistics,
    in_range,
    ranks,
    scalars,
    i,
    inside,
    length,
    others,
    teacher,
    TOP_BIAS: tl.constexpr,
    STUDENT: tl.constexpr,
    TAUGHT: tl.constexpr,
    RANKED: tl.constexpr,
):
    """The statistics (1 + 2K, length) of positions i from their complete sums, over `others` positions each: the
    student's, the teacher's two, the ranks, of which some may be missing."""
    of_student, of_teacher, of_weighted, of_ranks = sums
    usable = inside
    if STUDENT:
        reference = center(tl.load(scalars + BOUND), HEADROOM)
        lse, good = log_sum_exp(of_student, reference, others)
        tl.store(statistics + i, lse, mask=inside)
        usable &= good
    if TAUGHT:
        reference = center(tl.load(scalars + TEACHER_BOUND), HEADROOM) + tl.load(scalars + TOP_BIAS)
        lse, good = log_sum_exp(of_teacher, reference, others)
        place = statistics + (1 + 2 * teacher).to(tl.int64) * length + i
        tl.store(place, lse, mask=inside)
        tl.store(place + length, of_weighted / of_teacher * tl.load(scalars + SCALE), mask=inside)
        usable &= good & (tl.abs(of_weighted) < float("inf"))
    if RANKED:
        tl.store(ranks + i, of_ranks.to(tl.int64), mask=inside)
    tl.store(in_range + i, usable.to(tl.int8), mask=inside)


@triton.jit
def add_direction(
    slots,
    mirror_slots,
    results,
    positions,
    first,
    last,
    scalars,
    edge,
    others,
    teacher,
    TOP_BIAS: tl.constexpr,
    STUDENT: tl.constexpr,
    TAUGHT: tl.constexpr,
    RANKED: tl.constexpr,
    MIRRORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK positions of one direction. slots, and with MIRRORED mirror_slots: as slot_sum takes them; results:
    (totals, statistics, in_range, ranks); positions: (of the super-block's start, within it, its end, of the direction
    in all)."""
    totals, statistics, in_range, ranks = results
    start, local, end, length = positions
    i = start + local
    inside = i < end
    STATISTICS: tl.constexpr = STUDENT + 2 * TAUGHT + RANKED
    none = tl.zeros((BLOCK,), tl.float32)
    of_student = none
    of_teacher = none
    of_weighted = none
    of_ranks = none
    for which in tl.static_range(STATISTICS):
        total = slot_sum(slots, which, local, inside, edge, STATISTICS, MIRRORED, BLOCK)
        if MIRRORED:
            total += slot_sum(mirror_slots, which, local, inside, edge, STATISTICS, MIRRORED, BLOCK)
        place = totals + which * length.to(tl.int64) + i
        if first == 0:
            total += tl.load(place, mask=inside, other=0.0)
        if last == 0:
            tl.store(place, total, mask=inside)
        if which == 0 and STUDENT:
            of_student = total
        elif RANKED and which == STATISTICS - 1:
            of_ranks = total
        elif which == STUDENT:
            of_teacher = total
        else:
            of_weighted = total
    if last:
        finish_direction(
            (of_student, of_teacher, of_weighted, of_ranks),
            statistics,
            in_range,
            ranks,
            scalars,
            i,
            inside,
            length,
            others,
            teacher,
            TOP_BIAS,
            STUDENT,
            TAUGHT,
            RANKED,
        )


@triton.jit(do_not_specialize=["row_start", "row_end", "column_start", "column_end", "rows", "columns", "teacher"])
def sums_kernel(
    row_sums,
    column_sums,
    mirror_row_sums,
    mirror_column_sums,
    row_totals,
    column_totals,
    row_statistics,
    column_statistics,
    row_in_range,
    column_in_range,
    row_ranks,
    column_ranks,
    scalars,
    row_start,
    row_end,
    column_start,
    column_end,
    edge,
    rows,
    columns,
    teacher,
    STUDENT: tl.constexpr,
    TAUGHT: tl.constexpr,
    RANKED: tl.constexpr,
    MIRRORED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK positions: programs go over the super-block's rows, then its columns, then, beside the diagonal of a
    mirrored problem, its columns as the mirror's rows and its rows as the mirror's columns.

    row_sums, column_sums, mirror_...   as softmax_forward_kernel leaves them
    row_totals, column_totals           (statistics, rows) and (statistics, columns), of earlier super-blocks
    row_statistics, column_statistics   (1 + 2K, rows) and (1 + 2K, columns) as in stats.py; `teacher`: which of the K
    row_in_range, column_in_range       (rows,) and (columns,), 0 where the sums left fp32's range
    row_ranks, column_ranks             (rows,) and (columns,), None without RANKED
    """
    index = tl.program_id(0)
    height, width = row_end - row_start, column_end - column_start
    along_rows, along_columns = tl.cdiv(height, BLOCK), tl.cdiv(width, BLOCK)
    row_slots = tl.cdiv(width, BLOCK_N)
    column_slots = tl.cdiv(height, BLOCK_M)
    row_results = (row_totals, row_statistics, row_in_range, row_ranks)
    column_results = (column_totals, column_statistics, column_in_range, column_ranks)
    on_diagonal = (row_start == column_start).to(tl.int32)
    columns_last = row_end == rows
    if MIRRORED:  # a column's last sums come with the mirror, or on the diagonal of the last rows
        columns_last = columns_last & (on_diagonal == 1)
    # On the diagonal the tiles below it are left out, and those on it have no mirror. Beside it the mirror's sums go to
    # other positions, so these have none of them.
    group: tl.constexpr = BLOCK_M // BLOCK_N if MIRRORED else 1
    of_rows = (row_sums, row_slots, (on_diagonal, 0, group, BLOCK_M, 1))
    of_columns = (column_sums, column_slots, (on_diagonal, 0, 1, BLOCK_M, -1))
    mirror_of_rows = (mirror_row_sums, column_slots * on_diagonal, (on_diagonal, 1, 1, BLOCK_M, -1))
    mirror_of_columns = (mirror_column_sums, row_slots * on_diagonal, (on_diagonal, 1, group, BLOCK_M, 1))
    if index < along_rows:
        add_direction(
            of_rows,
            mirror_of_rows,
            row_results,
            (row_start, index * BLOCK + tl.arange(0, BLOCK), row_end, rows),
            column_start == 0,
            column_end == columns,
            scalars,
            edge,
            columns,
            teacher,
            TOP_COLUMN_BIAS,
            STUDENT,
            TAUGHT,
            RANKED,
            MIRRORED,
            BLOCK,
        )
    elif index < along_rows + along_columns:
        add_direction(
            of_columns,
            mirror_of_columns,
            column_results,
            (column_start, (index - along_rows) * BLOCK + tl.arange(0, BLOCK), column_end, columns),
            row_start == 0,
            columns_last,
            scalars,
            edge,
            rows,
            teacher,
            TOP_ROW_BIAS,
            STUDENT,
            TAUGHT,
            RANKED,
            MIRRORED,
            BLOCK,
        )
    elif MIRRORED:
        index -= along_rows + along_columns
        if index < along_columns:
            add_direction(
                (mirror_row_sums, column_slots, None),
                None,
                row_results,
                (column_start, index * BLOCK + tl.arange(0, BLOCK), column_end, rows),
                row_start == 0,
                False,
                scalars,
                edge,
                columns,
                teacher,
                TOP_COLUMN_BIAS,
                STUDENT,
                TAUGHT,
                RANKED,
                False,
                BLOCK,
            )
        else:
            add_direction(
                (mirror_column_sums, row_slots, None),
                None,
                column_results,
                (row_start, (index - along_columns) * BLOCK + tl.arange(0, BLOCK), row_end, columns),
                False,
                column_end == columns,
                scalars,
                edge,
                rows,
                teacher,
                TOP_ROW_BIAS,
                STUDENT,
                TAUGHT,
                RANKED,
                False,
                BLOCK,
            )
