# mypy: disallow-untyped-defs=False
"""The forward block operation: sums of exponentials over the rows and the columns of every tile, and their launch.

For a tile of logits z (units of log 2, z = product * scale) and its teacher's logits t:

    e = 2^(z - reference)      rows: sum_j e                          columns: sum_i e
    f = 2^(t - reference_t)    rows: sum_j f u_j, sum_j f u_j product  columns: sum_i f v_i, sum_i f v_i product

with the bias weights u = 2^(column_bias - top), v = 2^(row_bias - top) from passes.py. The references are common to
the whole problem, so one exponential serves both directions and the sums of tiles simply add (sums.py). A sum that left
fp32's range is recomputed by online.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ...stats import Statistics
from . import launch, online, sm90, tuning
from .call import Call
from .passes import Pass, passes
from .persistent import PersistentCall
from .shapes import GROUP, SM90, TMA, Shape
from .softmax_forward_persistent import softmax_forward_persistent_kernel
from .sums import BLOCK, HEADROOM, sums_kernel
from .tiles import (
    EMBEDDINGS,
    LAYOUT,
    LOGITS,
    MATRICES,
    NONE,
    SCALE,
    SUPER_BLOCK,
    TRANSPOSED,
    exponents,
    grouped_tile,
    positives,
    product,
    relation,
    sum_rows,
    visible,
)

ARGUMENTS = {
    **MATRICES,
    "positive_column": "*i64?",
    "row_segment": "*i64?",
    "column_segment": "*i64?",
    "row_threshold": "*fp32?",
    "column_threshold": "*fp32?",
    "row_weight": "*fp32?",
    "column_weight": "*fp32?",
    "scalars": "*fp32",
    "row_sums": "*fp32",
    "column_sums": "*fp32",
    "mirror_row_sums": "*fp32",
    "mirror_column_sums": "*fp32",
    "positive_logit": "*fp32",
    **LAYOUT,
    **SUPER_BLOCK,
}


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
        tl.store(out_j, sum_rows(tile * tl.load(weight_i + i, mask=inside_i, other=0.0)[:, None]), mask=inside_j)
    else:
        tl.store(out_j, sum_rows(tile), mask=inside_j)


@triton.jit
def write_ranks(dot, scale, at, segment_i, segment_j, threshold_i, threshold_j, out_i, out_j):
    """How many logits of each row and column exceed its threshold; as fp32, exact up to 2^24."""
    i, j, inside_i, inside_j = at
    seen = visible(at, segment_i, segment_j)
    z = dot * scale
    above_i = seen & (z > tl.load(threshold_i + i, mask=inside_i, other=0.0)[:, None])
    tl.store(out_i, tl.sum(above_i.to(tl.float32), 1), mask=inside_i)
    above_j = seen & (z > tl.load(threshold_j + j, mask=inside_j, other=0.0)[None, :])
    tl.store(out_j, sum_rows(above_j.to(tl.float32)), mask=inside_j)


@triton.jit(do_not_specialize=["row_start", "row_end", "column_start", "column_end"])
def softmax_forward_kernel(
    x,
    y,
    teacher_x,
    teacher_y,
    positive_column,
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
    slot a tile, indexed within the super-block. A slot holds the student's sum (with STUDENT), the teacher's two (with
    a teacher), the ranks (with thresholds). TRANSPOSED works on the tiles (I, J) and (J, I) together: the mirror's sums
    go to mirror_row_sums (tile rows, STATISTICS, edge) and mirror_column_sums (tile columns, STATISTICS, edge). On the
    diagonal some slots are left alone, as sums_kernel knows. Without TRANSPOSED the mirror's are not used.
    """
    tiles_m = tl.cdiv(row_end - row_start, BLOCK_M)
    tiles_n = tl.cdiv(column_end - column_start, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP)
    if TEACHER == TRANSPOSED:
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
    rank = edge * (STATISTICS - 1)  # where the ranks and the teacher's sums lie in a slot
    teacher = edge * STUDENT
    # The teacher's exponentials are the student's, and so are their sums, which the compiler then takes once. Not with
    # segments, which mask the mirror otherwise, nor with weights, beside which a tile that is kept takes registers.
    SHARED: tl.constexpr = TIED and STUDENT and row_segment is None and row_weight is None and column_weight is None

    scale = tl.load(scalars + SCALE)
    factor, reference, teacher_factor, teacher_reference = exponents(scalars, HEADROOM, TIED)
    matrix_x = (x, x_stride, x_step)
    matrix_y = (y, y_stride, y_step)

    dot = product(matrix_x, matrix_y, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
    if positive_column is not None:
        column = positives(positive_column, i, inside_i, column_start + tile_n * BLOCK_N, column_end, BLOCK_N)
        if tl.max(column) >= 0:
            positive_dot = tl.sum(tl.where(tl.arange(0, BLOCK_N)[None, :] == column[:, None], dot, 0.0), 1)
            tl.store(positive_logit + i, positive_dot * scale, mask=column >= 0)
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

    if TEACHER == TRANSPOSED:
        # The tile (J, I), transposed: its rows' sums run down this tile. Each of the two tiles teaches the other.
        mirror_dot = product(matrix_y, matrix_x, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
        mirror_inside_i, mirror_inside_j = (
            i < tl.where(related > 0, row_end, 0),
            j < tl.where(related > 0, column_end, 0),
        )
        mirror_at = (i, j, mirror_inside_i, mirror_inside_j)
        if row_threshold is not None:
            write_ranks(
                mirror_dot,
                scale,
                mirror_at,
                column_segment,
                row_segment,
                column_threshold,
                row_threshold,
                mirror_column_sums + out_i + rank,
                mirror_row_sums + out_j + rank,
            )
        if SHARED:
            f = e
        else:
            f = masked(tl.exp2(dot * teacher_factor - teacher_reference), at, left, column_segment, row_segment)
        mirror_out_i = mirror_column_sums + out_i + teacher
        mirror_out_j = mirror_row_sums + out_j + teacher
        write_sums(f, column_weight, row_weight, mirror_out_i, mirror_out_j, mirror_at)
        write_sums(f * mirror_dot, column_weight, row_weight, mirror_out_i + edge, mirror_out_j + edge, mirror_at)
        if positive_column is not None:  # here, where the fewest tiles are alive
            row = positives(positive_column, j, mirror_inside_j, row_start + tile_m * BLOCK_M, row_end, BLOCK_M)
            if tl.max(row) >= 0:
                positive_dot = tl.sum(tl.where(tl.arange(0, BLOCK_M)[:, None] == row[None, :], mirror_dot, 0.0), 0)
                tl.store(positive_logit + j, positive_dot * scale, mask=row >= 0)
        e = masked(tl.exp2(mirror_dot * factor - reference), at, left, column_segment, row_segment)
        write_sums(e, None, None, mirror_column_sums + out_i, mirror_row_sums + out_j, mirror_at)
        t = mirror_dot
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
    elif TEACHER == LOGITS:
        t = dot
    if TEACHER != NONE:
        if SHARED:
            f = e
        else:
            f = masked(tl.exp2(t * teacher_factor - teacher_reference), at, left, row_segment, column_segment)
        teacher_i = row_sums + out_i + teacher
        teacher_j = column_sums + out_j + teacher
        write_sums(f, row_weight, column_weight, teacher_i, teacher_j, at)
        write_sums(f * dot, row_weight, column_weight, teacher_i + edge, teacher_j + edge, at)


def forward(problem: Problem) -> Statistics:
    """The block operation of the Backend protocol."""
    n, m, teachers = problem.rows, problem.columns, len(problem.teachers)
    like = problem.x.new_empty(0, dtype=torch.float32)
    rows, columns = (like.new_empty(1 + 2 * teachers, length) for length in (n, m))
    positive_logit = like.new_empty(n if problem.positive_column is not None else 0)
    ranked = problem.row_threshold is not None
    row_ranks, column_ranks = (like.new_empty(length if ranked else 0, dtype=torch.int64) for length in (n, m))
    row_in_range, column_in_range = (like.new_empty(length, dtype=torch.int8) for length in (n, m))
    results = {
        "row_statistics": rows,
        "column_statistics": columns,
        "row_in_range": row_in_range,
        "column_in_range": column_in_range,
        "row_ranks": row_ranks if ranked else None,
        "column_ranks": column_ranks if ranked else None,
    }
    launch_passes, scalars = passes(problem, zeroed=positive_logit if len(positive_logit) else None)
    for k, launch_pass in enumerate(launch_passes):
        own_results = results | {"teacher": k}
        sums = _tuned_sums(launch_pass, positive_logit, own_results)
        for i, j in launch.super_blocks(n, m, sums.edge, launch_pass.mirrored):
            sums.call(**launch.over(sums.shape, i, j))
            sums.add(i, j)
        online.recompute(launch_pass, own_results)
    return Statistics.of(rows, columns, positive_logit, row_ranks, column_ranks, scalars)


class _Sums:
    """A pass's sums over every row and every column, one super-block after the other: `call` fills the super-block's
    partial sums, and those of its mirror where the pass is mirrored; `add` takes them in a fixed order, and with the
    last ones writes the statistics to `results`, arguments of sums_kernel. `edge`: of a super-block."""

    def __init__(self, launch_pass: Pass, positive_logit: Tensor, results: dict[str, Any], shape: Shape) -> None:
        problem, self.mirrored, self.shape = launch_pass.problem, launch_pass.mirrored, shape
        statistics = int(launch_pass.student) + 2 * int(launch_pass.taught) + int(launch_pass.ranked)
        self.edge = launch.forward_edge(shape, statistics, self.mirrored, max(problem.rows, problem.columns))

        def slots(block: int) -> Tensor:
            return positive_logit.new_empty(self.edge // block, statistics, self.edge)

        self.partial = partial = {"row_sums": slots(shape.block_n), "column_sums": slots(shape.block_m)}
        if self.mirrored:
            partial |= {"mirror_row_sums": slots(shape.block_m), "mirror_column_sums": slots(shape.block_n)}
        else:
            partial |= {f"mirror_{name}": sums for name, sums in partial.items()}
        constants = launch.constants(launch_pass, shape) | {"STATISTICS": statistics, "edge": self.edge}
        arguments = launch_pass.arguments | constants | partial
        arguments |= {
            "positive_column": problem.positive_column if launch_pass.student else None,  # once is enough
            "positive_logit": positive_logit,
            "TIED": launch_pass.tied,
            "GROUP": GROUP,
        }
        self.call: Callable[..., None]
        if shape.way == TMA:
            processors = launch.processors(problem.x.device)
            self.call = PersistentCall(softmax_forward_persistent_kernel, arguments, shape, processors)
        elif shape.way == SM90:
            self.call = sm90.Sums(launch_pass, arguments)
        else:
            self.call = Call(softmax_forward_kernel, arguments, shape.options())
        arguments = constants | partial | results
        arguments |= {
            "row_totals": positive_logit.new_empty(statistics, problem.rows),
            "column_totals": positive_logit.new_empty(statistics, problem.columns),
            "scalars": launch_pass.scalars,
            "rows": problem.rows,
            "columns": problem.columns,
            "TAUGHT": launch_pass.taught,
            "RANKED": launch_pass.ranked,
            "MIRRORED": self.mirrored,
            "BLOCK": BLOCK,
        }
        self.add_call = Call(sums_kernel, arguments, {})

    def totals(self, i: slice, j: slice) -> dict[str, Tensor]:
        """What `call` leaves of a super-block, added over the slots: (statistics, positions) of rows and columns, and
        of its mirror's."""
        for slots in self.partial.values():
            slots.zero_()  # some are left alone
        self.call(**launch.over(self.shape, i, j))
        along = {"row_sums": i, "column_sums": j, "mirror_row_sums": j, "mirror_column_sums": i}
        lengths = {name: part.stop - part.start for name, part in along.items()}
        return {name: slots.sum(0)[:, : lengths[name]] for name, slots in self.partial.items()}

    def add(self, i: slice, j: slice) -> None:
        directions = 2 if self.mirrored and i != j else 1  # beside the diagonal the mirror's too
        programs = directions * (launch.tiles(i, BLOCK) + launch.tiles(j, BLOCK))
        self.add_call(programs, **launch.bounds(i, j))


def _tuned_sums(launch_pass: Pass, positive_logit: Tensor, results: dict[str, Any]) -> _Sums:
    """With the shape that is the fastest on the first super-block. The first pass fills `positive_logit` (N,)."""

    def trial(shape: Shape) -> tuple[tuning.Launch, int]:
        sums, problem = _Sums(launch_pass, positive_logit, results, shape), launch_pass.problem
        i, j = next(launch.super_blocks(problem.rows, problem.columns, sums.edge, launch_pass.mirrored))
        if shape.way == SM90:
            _test(sums, launch_pass, positive_logit, results)
        return functools.partial(sums.call, **launch.over(shape, i, j)), launch.entries(i, j)

    return _Sums(launch_pass, positive_logit, results, launch.choose_shape("forward", launch_pass, trial))


def _test(sums: _Sums, launch_pass: Pass, positive_logit: Tensor, results: dict[str, Any]) -> None:
    """Raises SelfTestError unless the sums agree with those of the first candidate, on a super-block of both."""
    trusted = _Sums(launch_pass, positive_logit, results, launch.candidates("forward", launch_pass)[0])
    edge, problem = min(sums.edge, trusted.edge), launch_pass.problem
    block = slice(0, min(edge, problem.rows)), slice(0, min(edge, problem.columns))
    totals = []
    for each in (sums, trusted):
        positive_logit.zero_()
        totals.append(each.totals(*block) | {"positive_logit": positive_logit.clone()})
    for name, found in totals[0].items():
        expected = totals[1][name]
        if name != "positive_logit":  # each sum by itself; a logit may be near 0
            found, expected = found[..., None], expected[..., None]
        sm90.check(name, found, expected, tolerance=2e-3)
