"""Each row's positive, the one entry of the logits that the kernels leave to PyTorch.

Its gradient near convergence is the difference of two numbers close to 1, and its logit is what retrieval ranks are
counted against: both are computed here in the accumulation dtype, O(N D) work, and never pass through a low precision.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .distributed import laps
from .distributed.exchange import Layout
from .indexing import row_slices, scatter_add
from .problem import Problem, Source, TeacherOperand, accumulation_dtype
from .stats import Statistics, StatisticsGradient

# The gradient.


def gradient(problem: Problem, statistics: Statistics, incoming: StatisticsGradient) -> Tensor:
    """∂loss/∂z at every row's positive, (N,), 0 where it is in another block: what the backends leave out of G. A
    probability near 1 enters as `expm1(z - lse)`, and its 1 first joins the hard target's gradient, with which it
    cancels: near convergence p - 1 keeps its digits."""
    inside, column = problem.positives_inside()
    z, rows, columns = statistics.positive_logit, statistics.rows, statistics.columns
    row_gradient, *row_teacher_gradients = incoming.rows.unbind()
    column_gradient, *column_teacher_gradients = incoming.columns.unbind()
    factors = [row_gradient, column_gradient[column]]
    log_probabilities = [z - rows.lse, z - columns.lse[column]]
    for k, teacher in enumerate(problem.teachers):
        t = _teacher_logit(problem, teacher, z)
        row_logit = t if teacher.column_bias is None else t + teacher.column_bias[column]
        column_logit = t if teacher.row_bias is None else t + teacher.row_bias
        factors += [row_teacher_gradients[k], column_teacher_gradients[k][column]]
        log_probabilities += [
            _log_ratio(row_logit, rows.teacher_lse[k]),
            _log_ratio(column_logit, columns.teacher_lse[k][column]),
        ]
    factor, log_probability = torch.stack(factors), torch.stack(log_probabilities)
    if problem.row_segment is not None and problem.column_segment is not None:  # a pair that is excluded has no weight
        excluded = problem.row_segment != problem.column_segment[column]
        log_probability = log_probability.masked_fill(excluded, -torch.inf)
    near_one = log_probability > math.log(0.5)
    exact = torch.where(near_one, torch.expm1(log_probability), torch.exp(log_probability))
    total = incoming.positive_logit + torch.where(near_one, factor, 0.0).sum(0) + (factor * exact).sum(0)
    return torch.where(inside, total, 0.0)


def add_gradient(problem: Problem, coefficient: Tensor, gx: Tensor | None, gy: Tensor | None) -> None:
    """`gx_i += c_i y_column[i]` and `gy_column[i] += c_i x_i`, in place; coefficient (N,), gx (N, D), gy (M, D). One
    that is None is not needed."""
    _, positive = problem.positives_inside()
    for part in row_slices(problem.x):
        column = positive[part]
        if gx is not None:
            gx[part] += coefficient[part, None] * problem.y[column]
        if gy is not None:
            scatter_add(gy, column, coefficient[part, None] * problem.x[part])


def _log_ratio(logit: Tensor, log_sum_exp: Tensor) -> Tensor:
    return torch.where(logit == -torch.inf, -torch.inf, logit - log_sum_exp)


def _teacher_logit(problem: Problem, teacher: TeacherOperand, z: Tensor) -> Tensor:
    """The teacher's logit at every row's positive, (N,), without biases; z is the student's."""
    x, y, (_, column) = problem.x, problem.y, problem.positives_inside()
    if teacher.source == Source.LOGITS or (teacher.source == Source.TRANSPOSED and _is_diagonal(column)):
        t = z
    elif teacher.source == Source.TRANSPOSED:
        # As a difference, so that a positive on the diagonal has bit for bit the student's logit.
        t = z + problem.scale * (_pairwise_dot(x, y, column, transposed=True) - _pairwise_dot(x, y, column))
    else:
        assert teacher.x is not None and teacher.y is not None
        t = _pairwise_dot(teacher.x, teacher.y, column).to(z.dtype)
    return t if teacher.scale is None else teacher.scale * t


def _is_diagonal(column: Tensor) -> bool:
    """Whether it is known without waiting for a GPU that row i's positive is column i."""
    return column.device.type == "cpu" and torch.equal(column, torch.arange(len(column)))


def _pairwise_dot(x: Tensor, y: Tensor, column: Tensor, transposed: bool = False) -> Tensor:
    """`x_i · y_column[i]`, transposed `x_column[i] · y_i`: (N,), accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    result = x.new_empty(len(column), dtype=dtype)
    for part in row_slices(column):
        left, right = (x[column[part]], y[part]) if transposed else (x[part], y[column[part]])
        result[part] = (left.to(dtype) * right.to(dtype)).sum(1)
    return result


# The logit as a threshold of retrieval ranks.


def with_thresholds(problem: Problem, own: bool, layout: Layout) -> Problem:
    """The problem with row_threshold and column_threshold: a logit must exceed the positive's by more than rounding, so
    that equal embeddings tie and no positive exceeds itself where a kernel sums in another order: the rounding of a dot
    product of D terms grows as sqrt(D). `own`: on every rank the positives are that rank's columns."""
    assert problem.positive_column is not None
    positive, size = _logits(problem, own, layout)
    eps = torch.finfo(positive.dtype).eps
    row_threshold = positive + (4 + problem.x.shape[1] ** 0.5) * eps * size
    column_threshold = laps.max_to_columns(row_threshold, problem.positive_column, layout)
    return replace(problem, row_threshold=row_threshold, column_threshold=column_threshold)


@torch.no_grad()
def _logits(problem: Problem, own: bool, layout: Layout) -> tuple[Tensor, Tensor]:
    """`z[i, positive[i]]` (N,) without a kernel, and the size its rounding is relative to,
    `scale * norm(x[i]) * norm(y[positive[i]])` (N,). Where positives may be other ranks' it takes a lap of its own."""
    assert problem.positive_column is not None
    positive, dtype = problem.positive_column, problem.accumulation_dtype
    logits, sizes = (problem.x.new_zeros(problem.rows, dtype=dtype) for _ in range(2))

    def visit(start: int, operands: list[Tensor]) -> list[Tensor]:
        block = operands[0].to(problem.y.dtype)
        for part in row_slices(problem.x) if len(block) else ():
            column = (positive[part] - start).clamp(0, len(block) - 1)
            inside, x, y = column == positive[part] - start, problem.x[part].to(dtype), block[column].to(dtype)
            logits[part] += torch.where(inside, problem.scale * (x * y).sum(1), 0.0)
            sizes[part] += torch.where(inside, problem.scale * x.norm(dim=1) * y.norm(dim=1), 0.0)
        return []

    columns = [laps.as_sent(problem.y, layout)]
    if own:
        visit(layout.column_start, columns)
    else:
        laps.lap(columns, visit, layout)
    return logits, sizes
