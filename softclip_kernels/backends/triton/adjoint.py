# mypy: disallow-untyped-defs=False
"""The gradient of the statistics from that of the reduced loss, in one launch where PyTorch takes a dozen operators:
what a linear form's value (reduced_loss.py) changes by with each of its statistics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ...stats import StatisticsGradient
from .call import Call, ceil_div
from .linear_forms import COEFFICIENTS, UNSPECIALIZED, Coefficients, coefficient

BLOCK = 256  # rows or columns of a program

ARGUMENTS = {
    "of_loss": "*fp32",
    "row_grad": "*fp32",
    "column_grad": "*fp32",
    "positive_grad": "*fp32",
    **COEFFICIENTS,
}


@triton.jit(do_not_specialize=UNSPECIALIZED)
def adjoint_kernel(
    of_loss,
    row_grad,
    column_grad,
    positive_grad,
    row_mass,
    row_dot,
    row_mean,
    row_weight,
    column_mass,
    column_dot,
    column_mean,
    column_weight,
    positive_column,
    row_mass_number,
    row_dot_number,
    row_mean_number,
    row_weight_number,
    row_share_number,
    column_mass_number,
    column_dot_number,
    column_mean_number,
    column_weight_number,
    column_share_number,
    rows,
    columns,
    TAUGHT: tl.constexpr,
    POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK rows a program, then BLOCK columns: the gradient of the statistics, as StatisticsGradient has it; the share
    of a direction that is not in the loss is 0."""
    gradient = tl.load(of_loss)
    place = tl.program_id(0)
    row_programs = tl.cdiv(rows, BLOCK)
    if place < row_programs:
        i = place * BLOCK + tl.arange(0, BLOCK)
        inside = i < rows
        share = coefficient(row_weight, row_weight_number, i, inside) * row_share_number
        tl.store(row_grad + i, gradient * (coefficient(row_mass, row_mass_number, i, inside) * share), mask=inside)
        if TAUGHT:
            mean = -coefficient(row_mean, row_mean_number, i, inside) * share
            tl.store(row_grad + rows.to(tl.int64) + i, gradient * mean, mask=inside)
        if POSITIVE:
            column = i
            if positive_column is not None:
                column = tl.load(positive_column + i, mask=inside, other=-1)
            known = inside & (column >= 0) & (column < columns)
            other = coefficient(column_weight, column_weight_number, column, known) * column_share_number
            other *= coefficient(column_dot, column_dot_number, column, known)
            less = coefficient(row_dot, row_dot_number, i, inside) * share + other
            tl.store(positive_grad + i, -gradient * less, mask=inside)
    else:
        j = (place - row_programs) * BLOCK + tl.arange(0, BLOCK)
        inside = j < columns
        share = coefficient(column_weight, column_weight_number, j, inside) * column_share_number
        mass = coefficient(column_mass, column_mass_number, j, inside)
        tl.store(column_grad + j, gradient * (mass * share), mask=inside)
        if TAUGHT:
            mean = -coefficient(column_mean, column_mean_number, j, inside) * share
            tl.store(column_grad + columns.to(tl.int64) + j, gradient * mean, mask=inside)


def adjoint(problem: Problem, of_loss: Tensor, given: Coefficients, numbers: tuple[float, ...]) -> StatisticsGradient:
    """The gradient of the statistics from the loss's own, 0-d."""
    sides, positive = 1 + len(problem.teachers), problem.positive_column is not None
    gradient = StatisticsGradient(
        of_loss.new_empty(sides, problem.rows),
        of_loss.new_empty(sides, problem.columns),
        of_loss.new_empty(problem.rows if positive else 0),
    )
    arguments = given.arguments(problem, numbers) | {
        "of_loss": of_loss,
        "row_grad": gradient.rows,
        "column_grad": gradient.columns,
        "positive_grad": gradient.positive_logit,
        "BLOCK": BLOCK,
    }
    Call(adjoint_kernel, arguments, {})(ceil_div(problem.rows, BLOCK) + ceil_div(problem.columns, BLOCK))
    return gradient
