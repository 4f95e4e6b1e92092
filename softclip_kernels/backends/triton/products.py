# mypy: disallow-untyped-defs=False
"""The matrix products of the backward pass, `gx[i] += G_ij @ y[j]` and `gy[j] += G_ij.T @ x[i]`, both of a super-block
in one launch, and with them those of its mirror where there is one.

In a launch of its own each would leave a part of the GPU without a tile (edges.py). A sum starts with the super-block
where the other side starts, so nothing is zeroed before, and it takes the later ones in their order.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from . import launch, tuning
from .call import Call, ceil_div, strides
from .shapes import LIBRARY, Shape

AddBlock = Callable[[slice, slice], None]

TAIL = tl.constexpr(16)  # the step through what whole steps of a product leave over

ARGUMENTS = {
    "g": "*student",
    "x": "*student",
    "y": "*student",
    "gx": "*fp32?",
    "gy": "*fp32?",
    "x_stride": "i32 stride",
    "x_step": "i32 step",
    "y_stride": "i32 stride",
    "y_step": "i32 step",
    "width": "i32 edge",  # other widths are the library's
    "gx_start": "i32",
    "row_tiles": "i32",
    "column_tiles": "i32",
    "row_start": "i32",
    "row_end": "i32",
    "column_start": "i32",
    "column_end": "i32",
    "edge": "i32 edge",
}


@triton.jit
def add_part(total, part, m, n, length, width, first, EVEN: tl.constexpr):
    """`total[m, n] += part` for the m below `length`; = instead of += where it is the first."""
    pointers = total + m.to(tl.int64)[:, None] * width + n[None, :]
    inside = (m < length)[:, None]
    if not EVEN:
        inside = inside & (n < width)[None, :]
    if not first:
        part += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, part, mask=inside)


@triton.jit
def add_tile(
    total,
    a,
    b,
    tile,
    width,
    length,
    depth,
    first,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile of `total += a @ b`, or of `total = a @ b` where it is the first; total (length, width) fp32. a (length,
    depth) and b (depth, width) are (pointer, stride of rows, stride along them), and a has whole tiles of rows."""
    a_pointer, a_stride, a_step = a
    b_pointer, b_stride, b_step = b
    across = tl.cdiv(width, BLOCK_N)
    m = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tile % across * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_D).to(tl.int64)
    a_rows = a_pointer + m.to(tl.int64)[:, None] * a_stride
    b_columns = b_pointer + n.to(tl.int64)[None, :] * b_step
    a_tile = a_rows + k[None, :] * a_step
    b_tile = b_columns + k[:, None] * b_stride
    a_advance = tl.full((), BLOCK_D, tl.int64) * a_step
    b_advance = tl.full((), BLOCK_D, tl.int64) * b_stride
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(depth > 0)  # as in `product` of tiles.py
    whole = depth // BLOCK_D * BLOCK_D
    for _ in range(0, whole, BLOCK_D):
        left = tl.load(a_tile)
        right = tl.load(b_tile) if EVEN else tl.load(b_tile, mask=(n < width)[None, :], other=0.0)
        value = tl.dot(left, right, value, input_precision="ieee")
        a_tile += a_advance
        b_tile += b_advance
    # What is left is masked on both sides, because anything may lie in `a` beyond the depth, NaN included. Steps are
    # short: masks take registers, and the sums leave few.
    for start in tl.range(whole, depth, TAIL, num_stages=1):
        rest = start + tl.arange(0, TAIL)
        wide_rest = rest.to(tl.int64)
        left = tl.load(a_rows + wide_rest[None, :] * a_step, mask=(rest < depth)[None, :], other=0.0)
        inside = (rest < depth)[:, None]
        if not EVEN:
            inside = inside & (n < width)[None, :]
        right = tl.load(b_columns + wide_rest[:, None] * b_stride, mask=inside, other=0.0)
        value = tl.dot(left, right, value, input_precision="ieee")
    # In halves, because what is added takes registers too.
    HALF: tl.constexpr = BLOCK_N // 2
    one, other = tl.split(tl.permute(tl.reshape(value, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    n = first_n + tl.arange(0, HALF)
    add_part(total, one, m, n, length, width, first, EVEN)
    add_part(total, other, m, n + HALF, length, width, first, EVEN)


@triton.jit(
    do_not_specialize=[
        "gx_start",
        "row_tiles",
        "column_tiles",
        "row_start",
        "row_end",
        "column_start",
        "column_end",
    ]
)
def products_kernel(
    g,
    x,
    y,
    gx,
    gy,
    x_stride,
    x_step,
    y_stride,
    y_step,
    width,
    gx_start,
    row_tiles,
    column_tiles,
    row_start,
    row_end,
    column_start,
    column_end,
    edge,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One tile of gx (rows from gx_start on, width) or of gy (columns, width), whichever are given: row_tiles programs
    for the rows [row_start, row_end), then column_tiles for the columns, then the same for the mirror, whose rows are
    the columns. g (edge, edge), and the mirror's after it. EVEN: the width is a multiple of BLOCK_N."""
    index = tl.program_id(0)
    programs = 0
    if gx is not None:
        programs += row_tiles
    if gy is not None:
        programs += column_tiles
    if index >= programs:  # the mirror's
        index -= programs
        row_tiles = column_tiles
        row_start, column_start = column_start, row_start
        row_end, column_end = column_end, row_end
        g += edge.to(tl.int64) * edge
    rows, columns = row_end - row_start, column_end - column_start
    if gx is None:
        row_tiles = 0
    if index < row_tiles:
        if gx is not None:
            add_tile(
                gx + (row_start - gx_start).to(tl.int64) * width,
                (g, edge, 1),
                (y + column_start.to(tl.int64) * y_stride, y_stride, y_step),
                index,
                width,
                rows,
                columns,
                column_start == 0,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                EVEN,
            )
    elif gy is not None:
        add_tile(
            gy + column_start.to(tl.int64) * width,
            (g, 1, edge),
            (x + row_start.to(tl.int64) * x_stride, x_stride, x_step),
            index - row_tiles,
            width,
            columns,
            rows,
            row_start == 0,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            EVEN,
        )


@dataclass(frozen=True)
class Operands:
    """What the products are made of, and where they are added.

    g         the scratch in the dtype of x, (edge, edge), or with the mirror's after it (2, edge, edge); the edge is in
              whole tiles of every candidate, and anything may lie beyond a super-block's end
    gx, gy    sums (N, D) and (M, D), fp32, not initialized; None: not needed
    by_range  gx holds one range of rows at a time
    """

    problem: Problem
    g: Tensor
    gx: Tensor | None
    gy: Tensor | None
    by_range: bool

    @property
    def mirrored(self) -> bool:
        return self.g.dim() == 3

    def added_by(self, shape: Shape) -> AddBlock:
        return self._in_library if shape.way == LIBRARY else self._in_one_launch(shape)

    def _pairs(self, i: slice, j: slice) -> tuple[tuple[slice, slice], ...]:
        """The rows and columns of what is in the scratch: the super-block, and its mirror beside the diagonal."""
        return ((i, j), (j, i)) if self.mirrored and i != j else ((i, j),)

    def _gx_start(self, rows: slice) -> int:
        """The position of gx's first row."""
        return rows.start if self.by_range else 0

    def _in_one_launch(self, shape: Shape) -> AddBlock:
        x, y = self.problem.x, self.problem.y
        across = ceil_div(x.shape[1], shape.block_n)
        arguments = {
            "g": self.g,
            "x": x,
            "y": y,
            "gx": self.gx,
            "gy": self.gy,
            "width": x.shape[1],
            "edge": self.g.shape[-1],
            "EVEN": x.shape[1] % shape.block_n == 0,
            **shape.constants(),
            **strides(x=x, y=y),
        }
        call = Call(products_kernel, arguments, shape.options())

        def tiles(part: slice) -> int:
            return launch.tiles(part, shape.block_m) * across

        def add(i: slice, j: slice) -> None:
            programs = sum(
                (self.gx is not None) * tiles(rows) + (self.gy is not None) * tiles(columns)
                for rows, columns in self._pairs(i, j)
            )
            start = self._gx_start(i)
            call(programs, gx_start=start, row_tiles=tiles(i), column_tiles=tiles(j), **launch.bounds(i, j))

        return add

    def _in_library(self, i: slice, j: slice) -> None:
        for g, (rows, columns) in zip(self.g.view(-1, *self.g.shape[-2:]), self._pairs(i, j), strict=False):
            block = g[: rows.stop - rows.start, : columns.stop - columns.start]
            if self.gx is not None:
                start = self._gx_start(rows)
                total = self.gx[rows.start - start : rows.stop - start]
                _add(total, block, self.problem.y[columns], columns.start == 0)
            if self.gy is not None:
                _add(self.gy[columns], block.T, self.problem.x[rows], rows.start == 0)


def _add(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    launch.add_product(total.zero_() if first else total, a, b)


class Products:
    """`products(i, j)` adds what the scratch holds for rows i and columns j, in the order of launch.super_blocks."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.add: AddBlock | None = None

    def __call__(self, i: slice, j: slice) -> None:
        if self.add is None:  # the first super-block, whose sums start anew however often it is timed
            self.add = self._fastest(i, j)
        self.add(i, j)

    def _fastest(self, i: slice, j: slice) -> AddBlock:
        def trial(shape: Shape) -> tuple[tuning.Launch, int]:
            return functools.partial(self.operands.added_by(shape), i, j), launch.entries(i, j)

        of = self.operands
        needed = [name for name, total in (("x", of.gx), ("y", of.gy)) if total is not None]
        return of.added_by(launch.choose_product_shape(of.problem, of.mirrored, needed, trial))
