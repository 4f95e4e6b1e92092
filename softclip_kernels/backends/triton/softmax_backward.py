# mypy: disallow-untyped-defs=False
"""The backward block operation: a super-block of G, recomputed and finished in one epilogue, and its matrix products.

    G_ij = grad_row_i 2^(z_ij - row_lse_i) + grad_column_j 2^(z_ij - column_lse_j) + the same of the teacher's logits

One exponential relative to a common reference serves both directions of a softmax, and both softmaxes when the teacher
is tied to the student:

    G_ij = 2^(z_ij - reference) (a_i u_j + b_j v_i),   a_i = grad_row_i 2^(reference - row_lse_i),   b_j likewise,

with the bias weights u and v from passes.py, a and b from coefficients.py. A tile beside a coefficient that is out of
range takes another branch, an exponential a direction, without asking the host. Positives are left 0: the caller adds
them in full precision.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ...stats import InputGradients, Statistics, StatisticsGradient, Wanted
from . import coefficients, launch, sm90, tuning
from .call import Call
from .coefficients import HEADROOM, all_in_range
from .edges import Work, best_edge, memory_for_scratch
from .gradients import Gradients
from .passes import Pass, passes
from .shapes import EXCHANGE, GROUP, SM90, SPLIT, TMA, Shape
from .softmax_backward_persistent import PersistentBlocks
from .softmax_exchange import Exchange
from .softmax_gradient import finish
from .tiles import (
    EMBEDDINGS,
    LAYOUT,
    LOGITS,
    MATRICES,
    NONE,
    SUPER_BLOCK,
    TRANSPOSED,
    exponents,
    grouped_tile,
    product,
    relation,
    store,
    visible,
    without_positives,
)

ARGUMENTS = {
    **MATRICES,
    "positive_column": "*i64?",
    "row_segment": "*i64?",
    "column_segment": "*i64?",
    "row_student_coefficient": "*fp32",
    "row_teacher_coefficient": "*fp32",
    "row_in_range": "*i8",
    "column_student_coefficient": "*fp32",
    "column_teacher_coefficient": "*fp32",
    "column_in_range": "*i8",
    "row_weight": "*fp32?",
    "column_weight": "*fp32?",
    "row_student_exponent": "*fp32",
    "row_teacher_exponent": "*fp32",
    "column_student_exponent": "*fp32",
    "column_teacher_exponent": "*fp32",
    "row_bias": "*fp32?",
    "column_bias": "*fp32?",
    "scalars": "*fp32",
    "previous": "*previous?",
    "g": "*grad",
    "mirror_g": "*grad",
    **LAYOUT,
    **SUPER_BLOCK,
}


@triton.jit(do_not_specialize=["row_start", "row_end", "column_start", "column_end"])
def softmax_backward_kernel(
    x,
    y,
    teacher_x,
    teacher_y,
    positive_column,
    row_segment,
    column_segment,
    row_student_coefficient,
    row_teacher_coefficient,
    row_in_range,
    column_student_coefficient,
    column_teacher_coefficient,
    column_in_range,
    row_weight,
    column_weight,
    row_student_exponent,
    row_teacher_exponent,
    column_student_exponent,
    column_teacher_exponent,
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

    g (rows of the super-block, edge): the scratch, any floating dtype. previous, another of that shape or None: what
    earlier launches left, added here. TRANSPOSED works on the tiles (I, J) and (J, I) together: the
    mirror goes to mirror_g (columns of the super-block, edge), which on the diagonal is g itself.
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
    at = (i, j, inside_i, inside_j)
    first_i, first_j = row_start + tile_m * BLOCK_M, column_start + tile_n * BLOCK_N
    whole = (first_i + BLOCK_M <= row_end) & (first_j + BLOCK_N <= column_end)
    in_range = all_in_range(row_in_range, first_i, row_end, BLOCK_M)
    in_range &= all_in_range(column_in_range, first_j, column_end, BLOCK_N)
    if TEACHER == TRANSPOSED:
        mirror_in_range = all_in_range(column_in_range, first_i, row_end, BLOCK_M)
        mirror_in_range &= all_in_range(row_in_range, first_j, column_end, BLOCK_N)
        in_range &= mirror_in_range

    safe_i, safe_j = tl.minimum(i, row_end - 1), tl.minimum(j, column_end - 1)
    factor, reference, teacher_factor, teacher_reference = exponents(scalars, HEADROOM, TIED)
    matrix_x = (x, x_stride, x_step)
    matrix_y = (y, y_stride, y_step)
    student = (
        factor,
        reference,
        (row_student_coefficient, None, row_student_exponent, None),
        (column_student_coefficient, None, column_student_exponent, None),
    )
    teacher = (
        teacher_factor,
        teacher_reference,
        (row_teacher_coefficient, row_weight, row_teacher_exponent, row_bias),
        (column_teacher_coefficient, column_weight, column_teacher_exponent, column_bias),
    )

    if STUDENT or TEACHER == LOGITS:
        dot = product(matrix_x, matrix_y, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
    if TEACHER == EMBEDDINGS:
        # The student's part is finished first: a second tile of logits takes the registers of the first.
        if STUDENT:
            student_value, _ = finish(dot, dot, student, teacher, at, in_range, True, NONE)
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
        value, _ = finish(t, t, student, teacher, at, in_range, False, EMBEDDINGS)
        if STUDENT:
            value += student_value
    else:
        t = dot
        if TEACHER == TRANSPOSED:  # the tile (J, I), transposed
            t = product(matrix_y, matrix_x, safe_i, safe_j, width, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, PRECISION)
        value, mirror_value = finish(dot, t, student, teacher, at, in_range, STUDENT, TEACHER)

    if positive_column is not None:
        value = without_positives(value, positive_column, i, inside_i, first_j, column_end, 1)
    if row_segment is not None:
        value = tl.where(visible(at, row_segment, column_segment), value, 0.0)
    entry = local_i.to(tl.int64)[:, None] * edge + local_j[None, :]
    mask = inside_i[:, None] & inside_j[None, :]
    if previous is not None:
        value += tl.load(previous + entry, mask=mask, other=0.0)
    store(g + entry, value, whole, mask)

    if TEACHER == TRANSPOSED:
        mirror_inside_j = j < tl.where(related > 0, column_end, 0)
        if positive_column is not None:
            mirror_value = without_positives(mirror_value, positive_column, j, mirror_inside_j, first_i, row_end, 0)
        if row_segment is not None:
            mirror_value = tl.where(visible(at, column_segment, row_segment), mirror_value, 0.0)
        mirror_entry = local_j.to(tl.int64)[:, None] * edge + local_i[None, :]
        mask = mirror_inside_j[:, None] & inside_i[None, :]
        store(mirror_g + mirror_entry, tl.trans(mirror_value), whole & (related > 0), mask)


def backward(
    problem: Problem,
    statistics: Statistics,
    gradient: StatisticsGradient,
    wanted: Wanted,
) -> InputGradients:
    """The block operation of the Backend protocol."""
    if not any(wanted.products):
        return InputGradients(None, None, None)
    known = statistics.scalars if statistics.scalars.shape[0] else None  # of a larger problem's parts there are none
    launch_passes, _ = passes(problem, known)
    unit = launch.unit(problem.x.dtype, gradient.rows, gradient.columns)
    vectors, positive = coefficients.prepare(launch_passes, statistics, gradient, unit)
    blocks = _Blocks(problem, launch_passes, vectors, _edge(problem, launch_passes, wanted))
    gradients = Gradients(problem, wanted, blocks.scratch, positive, unit)
    for i, j in launch.super_blocks(problem.rows, problem.columns, blocks.edge, blocks.mirrored):
        blocks.compute(i, j)
        gradients.add(i, j)
    del blocks, vectors  # their memory serves the last gradient
    return gradients.result()


def _edge(problem: Problem, launch_passes: list[Pass], wanted: Wanted) -> int:
    """Of a super-block."""
    mirrored, (x_product, y_product) = launch_passes[0].mirrored, wanted.products
    itemsize, width, rounds = problem.x.element_size(), problem.x.shape[1], wanted.rounded and problem.x.itemsize < 4
    work = Work(
        problem.rows,
        problem.columns,
        width,
        g_width=sum(launch_pass.product_width for launch_pass in launch_passes),
        products=x_product + y_product,
        mirrored=mirrored,
        entry_bytes=itemsize * (1 + mirrored) + 4 * len(launch_passes[:-1][:2]),
        row_bytes=4 * width if x_product and rounds and not mirrored else 0,
    )
    every = tuple(shape for launch_pass in launch_passes for shape in launch.candidates("backward", launch_pass))
    last = problem.columns * width * itemsize if y_product and rounds else 0
    kept = last + (problem.rows * width * itemsize if mirrored and x_product and rounds else 0)
    memory = memory_for_scratch(kept, last)
    return best_edge(work, every, launch.product_candidates(problem), launch.processors(problem.x.device), memory)


class _Blocks:
    """One super-block of G at a time, in the same scratch (edge, edge) in the embeddings' dtype; where passes are
    mirrored (2, edge, edge), with the mirror of a super-block beside the diagonal."""

    def __init__(self, problem: Problem, launch_passes: list[Pass], vectors: list[dict[str, Any]], edge: int) -> None:
        self.mirrored, self.edge = launch_passes[0].mirrored, edge
        self.scratch = problem.x.new_empty(2, edge, edge) if self.mirrored else problem.x.new_empty(edge, edge)
        g, mirror_g = self.scratch if self.mirrored else (self.scratch, self.scratch)
        # Several teachers add up in fp32, from one buffer to the next, and are rounded once.
        wide = [torch.empty_like(g, dtype=torch.float32) for _ in launch_passes[:-1][:2]]
        self.launches = []
        for k, launch_pass in enumerate(launch_passes):
            arguments = launch_pass.arguments | vectors[k]
            arguments |= {
                "previous": wide[(k - 1) % 2] if k > 0 else None,
                "g": g if k == len(launch_passes) - 1 else wide[k % 2],
                "edge": self.edge,
                "TIED": launch_pass.tied,
                "GROUP": GROUP,
            }
            self.launches.append(_tuned_launch(launch_pass, arguments, mirror_g))

    def compute(self, i: slice, j: slice) -> None:
        for block_launch in self.launches:
            block_launch(i, j)


class _BlockLaunch:
    """Fills a super-block of G with what a pass adds to it, and its mirror where the pass is mirrored."""

    def __init__(self, launch_pass: Pass, arguments: dict[str, Any], mirror_g: Tensor, shape: Shape) -> None:
        self.g, self.mirror_g, self.mirrored, self.shape = arguments["g"], mirror_g, launch_pass.mirrored, shape
        self.call = self._call(launch_pass, arguments)

    def __call__(self, i: slice, j: slice) -> None:
        mirror_g = self.mirror_g if self.mirrored and i != j else self.g
        self._launch(self.call, i, j, mirror_g=mirror_g)

    def _call(self, launch_pass: Pass, arguments: dict[str, Any], **others: Any) -> Call:
        arguments = arguments | launch.constants(launch_pass, self.shape) | others
        return Call(softmax_backward_kernel, arguments, self.shape.options())

    def _launch(self, call: Call, i: slice, j: slice, **changing: Any) -> None:
        call(**changing, **launch.over(self.shape, i, j))


class _Split(_BlockLaunch):
    """The student's part, rounded to the scratch, and the teacher's added to it."""

    def __init__(self, launch_pass: Pass, arguments: dict[str, Any], mirror_g: Tensor, shape: Shape) -> None:
        super().__init__(launch_pass.untaught(), arguments, mirror_g, shape)
        self.taught = self._call(replace(launch_pass, student=False), arguments | {"previous": self.g})

    def __call__(self, i: slice, j: slice) -> None:
        super().__call__(i, j)
        self._launch(self.taught, i, j, mirror_g=self.g)


BlockLaunch = Callable[[slice, slice], None]
_WAYS: dict[str, Callable[..., BlockLaunch]]
_WAYS = {"": _BlockLaunch, EXCHANGE: Exchange, SPLIT: _Split, TMA: PersistentBlocks, SM90: sm90.GradientBlocks}


def _tuned_launch(launch_pass: Pass, arguments: dict[str, Any], mirror_g: Tensor) -> BlockLaunch:
    """With the shape that is the fastest on a typical super-block."""

    def block_launch(shape: Shape) -> BlockLaunch:
        return _WAYS[shape.way](launch_pass, arguments, mirror_g, shape)

    def trial(shape: Shape) -> tuple[tuning.Launch, int]:
        problem, edge = launch_pass.problem, arguments["edge"]
        blocks = launch.super_blocks(problem.rows, problem.columns, edge, launch_pass.mirrored)
        *_, typical = itertools.islice(blocks, 2)  # the second of mirrored ones: the first is on the diagonal
        tried = block_launch(shape)
        if shape.way == SM90:
            trusted = block_launch(launch.candidates("backward", launch_pass)[0])
            expected, found = (_filled(each, arguments["g"], mirror_g, *typical) for each in (trusted, tried))
            for block, wanted in zip(found, expected, strict=True):
                sm90.check("blocks of G", block, wanted, tolerance=0.03)
        return functools.partial(tried, *typical), launch.entries(*typical)

    return block_launch(launch.choose_shape("backward", launch_pass, trial))


def _filled(block_launch: BlockLaunch, g: Tensor, mirror_g: Tensor, i: slice, j: slice) -> list[Tensor]:
    """Copies of what a launch leaves of a super-block, and of its mirror where that is another."""
    block_launch(i, j)
    height, width = i.stop - i.start, j.stop - j.start
    blocks = [g[:height, :width]] if mirror_g is g or i == j else [g[:height, :width], mirror_g[:width, :height]]
    return [block.clone() for block in blocks]
