# mypy: disallow-untyped-defs=False
"""The gradients of a problem, from the matrix products of its super-blocks, one after the other (products.py).

    gx_i = unit * sum_j G_ij y_j + c_i y_p(i),   dx_i = scale * gx_i,   dscale = sum_i <x_i, gx_i>

with c_i the gradient at row i's positive p(i), which G leaves out, and the unit in which G is taken; likewise for the
columns. From a sum to a gradient one kernel goes over it once, in fp32 until it rounds.

Memory: sums are fp32. Where gradients are too, the sums become the gradients in place. Where they are not, rows are
finished range by range, as soon as they have met all columns, and gx is one range long; only mirrors, which come back
to a range later, need all of it. gy is whole; its gradient is made when the scratch and gx are free again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import positives
from ...problem import Problem
from ...stats import InputGradients, Wanted
from . import launch
from .call import Call, ceil_div, strides
from .products import Operands, Products
from .total import total

ROWS, WIDTH = 16, 128  # of a program's tile, which walks along the width

ARGUMENTS = {
    "total": "*fp32",
    "own": "*student",
    "other": "*student",
    "positive": "*i64?",
    "coefficient": "*fp32?",
    "unit": "*fp32?",
    "scale": "*fp32",
    "result": "*grad?",
    "inner": "*fp32?",
    "own_stride": "i32 stride",
    "own_step": "i32 step",
    "other_stride": "i32 stride",
    "other_step": "i32 step",
    "width": "i32 width",
    "total_start": "i32",
    "start": "i32",
    "end": "i32",
    "others": "i32",
}


@triton.jit(do_not_specialize=["total_start", "start", "end", "others"])
def finish_kernel(
    total,
    own,
    other,
    positive,
    coefficient,
    unit,
    scale,
    result,
    inner,
    own_stride,
    own_step,
    other_stride,
    other_step,
    width,
    total_start,
    start,
    end,
    others,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M of the rows [start, end) or, with COLUMNS, of the columns; `own` are their embeddings, `other` those of
    the other side.

    total        the sums, (.., width), from position total_start on
    positive     of each, a position of the other side; outside [0, others): none
    coefficient  the gradient at the positive of each row
    result       (positions, width); may be total itself
    inner        a sum of <own, gradient> for every BLOCK_M positions, before the scale; start is a multiple of BLOCK_M
    """
    i = start + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < end
    wide_i = i.to(tl.int64)[:, None]
    if positive is not None:
        j = tl.load(positive + i, mask=inside, other=-1)
        paired = (j >= 0) & (j < others)
        if COLUMNS:
            c = tl.load(coefficient + j, mask=paired, other=0.0)[:, None]
        else:
            c = tl.load(coefficient + i, mask=paired, other=0.0)[:, None]
    factor = tl.load(scale)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, width, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        mask = inside[:, None] & (n < width)
        value = tl.load(total + (wide_i - total_start) * width + n, mask=mask, other=0.0)
        if unit is not None:
            value *= tl.load(unit)
        if positive is not None:
            seen = paired[:, None] & (n < width)
            value += c * tl.load(other + j[:, None] * other_stride + n * other_step, mask=seen, other=0.0).to(
                tl.float32
            )
        if inner is not None:
            products += value * tl.load(own + wide_i * own_stride + n * own_step, mask=mask, other=0.0).to(tl.float32)
        if result is not None:
            tl.store(result + wide_i * width + n, (value * factor).to(result.dtype.element_ty), mask=mask)
    if inner is not None:
        tl.store(inner + start // BLOCK_M + tl.program_id(0), tl.sum(products))


class Gradients:
    """`add` every super-block of G, in the order of launch.super_blocks, then take the `result`.

    wanted       at least one gradient
    g            the scratch that `add` finds a super-block in, as in products.Operands
    coefficient  (N,) fp32, the gradient at every row's positive, 0 where there is none; None: no row has one
    unit         0-d fp32; None: 1
    """

    def __init__(
        self,
        problem: Problem,
        wanted: Wanted,
        g: Tensor,
        coefficient: Tensor | None = None,
        unit: Tensor | None = None,
    ) -> None:
        self.problem, self.wanted, self.coefficient, self.unit = problem, wanted, coefficient, unit
        self.dtype = problem.x.dtype if wanted.rounded else torch.float32
        self.from_x, needs_gy = wanted.products  # the scale's gradient follows from either sum
        in_place = wanted.x and self.dtype == torch.float32
        self.by_range = self.from_x and not in_place and g.dim() == 2
        rows, columns = problem.rows, problem.columns
        self.gx = self._empty(min(g.shape[-1], rows) if self.by_range else rows, torch.float32) if self.from_x else None
        self.gy = self._empty(columns, torch.float32) if needs_gy else None
        partial_sums = ceil_div(rows if self.from_x else columns, ROWS)
        self.inner = problem.x.new_empty(partial_sums, dtype=torch.float32) if wanted.scale else None
        self.dx = self._empty(rows, self.dtype) if wanted.x and self.by_range else None
        self.products: Products | None = Products(Operands(problem, g, self.gx, self.gy, self.by_range))
        self.finish_rows = self._finishing(self.gx, self.dx, columns=False) if self.by_range else None

    def add(self, i: slice, j: slice) -> None:
        """The super-block in the scratch, of rows i and columns j."""
        assert self.products is not None
        self.products(i, j)
        if self.finish_rows is not None and j.stop == self.problem.columns:
            _finish(self.finish_rows, i, i.start)

    def result(self) -> InputGradients:
        """Nothing can be added afterwards; a caller that still holds the scratch holds memory that dy could take."""
        self.products = self.finish_rows = None
        if self.gx is not None and not self.by_range:
            self.dx = self._finished(self.gx, columns=False)
        self.gx = dy = None
        if self.gy is not None:
            if self.coefficient is not None and self.problem.positive_row is None:  # rows may share a column
                coefficient = self.coefficient if self.unit is None else self.coefficient / self.unit
                positives.add_gradient(self.problem, coefficient, None, self.gy)
            dy = self._finished(self.gy, columns=True)
        self.gy = None
        return InputGradients(self.dx, dy, None if self.inner is None else total(self.inner))

    def _empty(self, length: int, dtype: torch.dtype) -> Tensor:
        return self.problem.x.new_empty(length, self.problem.x.shape[1], dtype=dtype)

    def _finished(self, total: Tensor, columns: bool) -> Tensor | None:
        """The gradient of the whole of one side, in place where it is fp32."""
        result = None  # the sums of x may be there for dscale alone
        if columns or self.wanted.x:
            result = total if self.dtype == torch.float32 else self._empty(total.shape[0], self.dtype)
        _finish(self._finishing(total, result, columns), slice(0, total.shape[0]), 0)
        return result

    def _finishing(self, total: Tensor | None, result: Tensor | None, columns: bool) -> Call:
        """The kernel on one side, to be launched on ranges of it."""
        p = self.problem
        own, other = (p.y, p.x) if columns else (p.x, p.y)
        positive, coefficient = p.positive_row if columns else p.positive_column, self.coefficient
        if positive is None or coefficient is None:
            positive = coefficient = None
        else:
            positive, coefficient = positive.contiguous(), coefficient.contiguous()
        arguments = {
            "total": total,
            "own": own,
            "other": other,
            "positive": positive,
            "coefficient": coefficient,
            "unit": self.unit,
            "scale": p.scale,
            "result": result,
            "inner": self.inner if columns != self.from_x else None,
            "width": own.shape[1],
            "others": other.shape[0],
            "COLUMNS": columns,
            "BLOCK_M": ROWS,
            "BLOCK_N": WIDTH,
            **strides(own=own, other=other),
        }
        return Call(finish_kernel, arguments, {"num_warps": 4})


def _finish(call: Call, part: slice, total_start: int) -> None:
    call(launch.tiles(part, ROWS), total_start=total_start, start=part.start, end=part.stop)
