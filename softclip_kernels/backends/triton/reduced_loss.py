# mypy: disallow-untyped-defs=False
"""The reduced loss from the statistics, in one launch where PyTorch takes half a dozen operators:

    row_share * sum_i weight_i (mass_i lse_i - dot_i positive_i - mean_i teacher_mean_i) + the columns' likewise

Sums are float64, in a fixed order, by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ...stats import Statistics
from .call import Call
from .linear_forms import COEFFICIENTS, UNSPECIALIZED, Coefficients, coefficient

AT_ONCE = 1024  # entries that are added at once

ARGUMENTS = {
    "row_statistics": "*fp32",
    "column_statistics": "*fp32",
    "positive_logit": "*fp32",
    "result": "*fp32",
    **COEFFICIENTS,
}


@triton.jit
def sum_of_direction(
    form,
    statistics,
    positive_logit,
    length,
    SEEN: tl.constexpr,
    POSITIVE: tl.constexpr,
    TAUGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(BLOCK,) float64, whose sum is that of a direction's losses; form: (vector, number) of each of NAMES. POSITIVE:
    position i's positive logit is the i-th."""
    mass, dot, mean, weight = form
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < length
        lse = tl.load(statistics + i, mask=inside, other=0.0)
        if SEEN:
            lse = tl.where(lse == -float("inf"), 0.0, lse)
        loss = coefficient(mass[0], mass[1], i, inside) * lse
        if POSITIVE:
            loss -= coefficient(dot[0], dot[1], i, inside) * tl.load(positive_logit + i, mask=inside, other=0.0)
        if TAUGHT:
            means = tl.load(statistics + 2 * length.to(tl.int64) + i, mask=inside, other=0.0)
            loss -= coefficient(mean[0], mean[1], i, inside) * means
        loss *= coefficient(weight[0], weight[1], i, inside)
        total += tl.where(inside, loss, 0.0).to(tl.float64)
    return total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def loss_kernel(
    row_statistics,
    column_statistics,
    positive_logit,
    result,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEEN: tl.constexpr,
    TAUGHT: tl.constexpr,
    POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result (): the reduced loss. row_statistics (1 + 2K, rows), K at most 1; a coefficient that is None is its
    number. ROWS, COLUMNS: the directions that are in the loss. SEEN: a log-sum-exp may be -inf, and counts as 0 then.
    POSITIVE: rows have positives, in positive_column; None: row i's is column i."""
    total = tl.zeros((BLOCK,), tl.float64)
    if ROWS:
        form = (
            (row_mass, row_mass_number),
            (row_dot, row_dot_number),
            (row_mean, row_mean_number),
            (row_weight, row_weight_number),
        )
        of_rows = sum_of_direction(form, row_statistics, positive_logit, rows, SEEN, POSITIVE, TAUGHT, BLOCK)
        total += of_rows * row_share_number
    if COLUMNS:
        form = (
            (column_mass, column_mass_number),
            (column_dot, column_dot_number),
            (column_mean, column_mean_number),
            (column_weight, column_weight_number),
        )
        DIAGONAL: tl.constexpr = POSITIVE and positive_column is None
        of_columns = sum_of_direction(form, column_statistics, positive_logit, columns, SEEN, DIAGONAL, TAUGHT, BLOCK)
        if positive_column is not None:
            for start in range(0, rows, BLOCK):
                i = start + tl.arange(0, BLOCK)
                column = tl.load(positive_column + i, mask=i < rows, other=-1)
                inside = (column >= 0) & (column < columns)
                dot = coefficient(column_dot, column_dot_number, column, inside)
                dot *= coefficient(column_weight, column_weight_number, column, inside)
                dot *= tl.load(positive_logit + i, mask=inside, other=0.0)
                of_columns -= tl.where(inside, dot, 0.0).to(tl.float64)
        total += of_columns * column_share_number
    tl.store(result, tl.sum(total).to(tl.float32))


def loss(problem: Problem, statistics: Statistics, given: Coefficients, numbers: tuple[float, ...]) -> Tensor:
    """0-d."""
    result = statistics.positive_logit.new_empty(())
    arguments = given.arguments(problem, numbers) | {
        "row_statistics": statistics.rows.packed,
        "column_statistics": statistics.columns.packed,
        "positive_logit": statistics.positive_logit,
        "result": result,
        "BLOCK": AT_ONCE,
    }
    Call(loss_kernel, arguments, {})(1)
    return result
