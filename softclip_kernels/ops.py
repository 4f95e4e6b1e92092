"""The two custom operators. torch.compile and the dispatcher see one opaque call each; the backend is chosen inside.

    softclip::forward (problem)                          -> Statistics
    softclip::backward(problem, Statistics, gradients)   -> dx, dy, dscale

Operators take flat arguments, so a Problem travels as its tensors; `pack` and `unpack` are the two directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .indexing import row_slices, scatter_add
from .problem import Problem, Source, Statistics, TeacherOperand, accumulation_dtype

FIELDS_PER_TEACHER = 5  # TeacherOperand.tensors()


def pack(problem: Problem) -> tuple[list[Any], list[int]]:
    """The operators' leading arguments and the teachers' sources: `forward(*arguments, sources, backend)`."""
    operands = [tensor for teacher in problem.teachers for tensor in teacher.tensors()]
    arguments = [
        problem.x,
        problem.y,
        problem.scale,
        problem.positive_column,
        problem.row_segment,
        problem.column_segment,
        problem.row_threshold,
        problem.column_threshold,
        operands,
    ]
    return arguments, [int(teacher.source) for teacher in problem.teachers]


def unpack(arguments: Sequence[Any], sources: Sequence[int]) -> Problem:
    *fields, operands = arguments
    teachers = tuple(
        TeacherOperand(Source(source), *operands[k * FIELDS_PER_TEACHER : (k + 1) * FIELDS_PER_TEACHER])
        for k, source in enumerate(sources)
    )
    x, y, scale, positive, row_segment, column_segment, row_threshold, column_threshold = fields
    return Problem(x, y, scale, positive, row_segment, column_segment, teachers, row_threshold, column_threshold)


def block_forward(problem: Problem, backend: str) -> Statistics:
    """The forward operator on a Problem."""
    with torch.autocast(problem.x.device.type, enabled=False):
        return backends.select(backend, problem).forward(problem)


def block_backward(
    problem: Problem,
    statistics: Statistics,
    grad_rows: Tensor,
    grad_columns: Tensor,
    grad_positive: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator on a Problem; dx (N, D), dy (M, D) and dscale in the accumulation dtype, so that blocks may
    be added before anything is rounded."""
    with torch.autocast(problem.x.device.type, enabled=False):
        gx, gy = backends.select(backend, problem).backward(problem, statistics, grad_rows, grad_columns)
        if problem.positive_column is not None:
            coefficient = _positive_gradient(problem, statistics, grad_rows, grad_columns, grad_positive)
            _add_positive(problem, coefficient, gx, gy)
        grad_scale = _inner_product(problem.x, gx)
        return gx.mul_(problem.scale), gy.mul_(problem.scale), grad_scale


@torch.library.custom_op("softclip::forward", mutates_args=())
def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor | None,
    row_segment: Tensor | None,
    column_segment: Tensor | None,
    row_threshold: Tensor | None,
    column_threshold: Tensor | None,
    operands: Sequence[Tensor | None],
    sources: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (x, y, scale, positive, row_segment, column_segment, row_threshold, column_threshold, operands)
    rows, columns, positive_logit, row_ranks, column_ranks = block_forward(unpack(arguments, sources), backend)
    return rows, columns, positive_logit, row_ranks, column_ranks


@forward.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor | None,
    row_segment: Tensor | None,
    column_segment: Tensor | None,
    row_threshold: Tensor | None,
    column_threshold: Tensor | None,
    operands: Sequence[Tensor | None],
    sources: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    n, m, statistics = x.shape[0], y.shape[0], 1 + 2 * len(sources)
    ranked = row_threshold is not None
    return (
        x.new_empty((statistics, n), dtype=dtype),
        x.new_empty((statistics, m), dtype=dtype),
        x.new_empty(n if positive is not None else 0, dtype=dtype),
        x.new_empty(n if ranked else 0, dtype=torch.int64),
        x.new_empty(m if ranked else 0, dtype=torch.int64),
    )


@torch.library.custom_op("softclip::backward", mutates_args=())
def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor | None,
    row_segment: Tensor | None,
    column_segment: Tensor | None,
    operands: Sequence[Tensor | None],
    sources: Sequence[int],
    backend: str,
    rows: Tensor,
    columns: Tensor,
    positive_logit: Tensor,
    grad_rows: Tensor,
    grad_columns: Tensor,
    grad_positive: Tensor,
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows` .. `positive_logit` are the forward's Statistics; `grad_rows` (1 + K, N), `grad_columns` (1 + K, M) and
    `grad_positive` (N,) or (0,) the gradients of the loss with respect to each log-sum-exp, each teacher's mean and the
    positive's logit. dscale, and dx and dy unless `rounded` to the dtype of x and y, have the accumulation dtype."""
    arguments = (x, y, scale, positive, row_segment, column_segment, None, None, operands)
    problem = unpack(arguments, sources)
    nothing = torch.empty(0, dtype=torch.int64, device=x.device)
    statistics = Statistics(rows, columns, positive_logit, nothing, nothing)
    gradients = list(block_backward(problem, statistics, grad_rows, grad_columns, grad_positive, backend))
    # Rounded one after the other, each sum released at once: they are larger than what they are rounded to.
    for index, dtype in enumerate((x.dtype, y.dtype) if rounded else ()):
        gradients[index] = gradients[index].to(dtype)
    dx, dy, dscale = gradients
    return dx, dy, dscale


@backward.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor | None,
    row_segment: Tensor | None,
    column_segment: Tensor | None,
    operands: Sequence[Tensor | None],
    sources: Sequence[int],
    backend: str,
    rows: Tensor,
    columns: Tensor,
    positive_logit: Tensor,
    grad_rows: Tensor,
    grad_columns: Tensor,
    grad_positive: Tensor,
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    dtype = x.dtype if rounded else wide
    return x.new_empty(x.shape, dtype=dtype), y.new_empty(y.shape, dtype=dtype), x.new_empty((), dtype=wide)


def without_graph(gradients: tuple[Tensor, ...], operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients as they are; but where autograd is recording, differentiating them again is an error. (PyTorch's
    once_differentiable says so only where the incoming gradients require a gradient, and else returns constants.)"""
    return _Constant.apply(len(gradients), *gradients, *operands) if torch.is_grad_enabled() else gradients


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("the loss is once_differentiable: its gradient comes from a kernel, which has no gradient")


def _positive_gradient(
    problem: Problem, statistics: Statistics, grad_rows: Tensor, grad_columns: Tensor, grad_positive: Tensor
) -> Tensor:
    """∂loss/∂z at every row's positive, (N,), 0 where it is in another block: what the backends leave out of G, so that
    it never passes through a low precision. A probability near 1 enters as `expm1(z - lse)`, and its 1 first joins the
    hard target's gradient, with which it cancels: near convergence p - 1 keeps its digits."""
    assert problem.positive_column is not None
    inside, column = problem.positives_inside()
    z = statistics.positive_logit
    gradients = [grad_rows[0], grad_columns[0][column]]
    log_probabilities = [z - statistics.rows[0], z - statistics.columns[0][column]]
    for k, teacher in enumerate(problem.teachers):
        t = _teacher_logit_at_positive(problem, teacher, z)
        row_logit = t if teacher.column_bias is None else t + teacher.column_bias[column]
        column_logit = t if teacher.row_bias is None else t + teacher.row_bias
        gradients += [grad_rows[1 + k], grad_columns[1 + k][column]]
        log_probabilities += [
            _log_ratio(row_logit, statistics.rows[1 + 2 * k]),
            _log_ratio(column_logit, statistics.columns[1 + 2 * k][column]),
        ]
    gradient, log_probability = torch.stack(gradients), torch.stack(log_probabilities)
    if problem.row_segment is not None and problem.column_segment is not None:  # a pair that is excluded has no weight
        excluded = problem.row_segment != problem.column_segment[column]
        log_probability = log_probability.masked_fill(excluded, -torch.inf)
    near_one = log_probability > math.log(0.5)
    exact = torch.where(near_one, torch.expm1(log_probability), torch.exp(log_probability))
    total = grad_positive + torch.where(near_one, gradient, 0.0).sum(0) + (gradient * exact).sum(0)
    return torch.where(inside, total, 0.0)


def _log_ratio(logit: Tensor, log_sum_exp: Tensor) -> Tensor:
    return torch.where(logit == -torch.inf, -torch.inf, logit - log_sum_exp)


def _teacher_logit_at_positive(problem: Problem, teacher: TeacherOperand, z: Tensor) -> Tensor:
    x, y, (_, column) = problem.x, problem.y, problem.positives_inside()
    if teacher.source == Source.LOGITS or (teacher.source == Source.TRANSPOSED and _is_diagonal(column)):
        t = z
    elif teacher.source == Source.TRANSPOSED:
        # As a difference, so that a positive on the diagonal has bit for bit the student's logit.
        t = z + problem.scale * (_pairwise_dot(x, y, column, swap=True) - _pairwise_dot(x, y, column))
    else:
        assert teacher.x is not None and teacher.y is not None
        t = _pairwise_dot(teacher.x, teacher.y, column).to(z.dtype)
    return t if teacher.scale is None else teacher.scale * t


def _is_diagonal(column: Tensor) -> bool:
    """Whether it is known without waiting for a GPU that row i's positive is column i."""
    return column.device.type == "cpu" and torch.equal(column, torch.arange(len(column)))


def _pairwise_dot(x: Tensor, y: Tensor, column: Tensor, swap: bool = False) -> Tensor:
    """`x_i · y_column[i]`, or with swap `x_column[i] · y_i`: (N,), accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    result = x.new_empty(len(column), dtype=dtype)
    for part in row_slices(column):
        left, right = (x[column[part]], y[part]) if swap else (x[part], y[column[part]])
        result[part] = (left.to(dtype) * right.to(dtype)).sum(1)
    return result


def _add_positive(problem: Problem, coefficient: Tensor, gx: Tensor, gy: Tensor) -> None:
    """`gx_i += c_i y_column[i]` and `gy_column[i] += c_i x_i`, in place."""
    _, positive = problem.positives_inside()
    for part in row_slices(problem.x):
        column = positive[part]
        gx[part] += coefficient[part, None] * problem.y[column]
        scatter_add(gy, column, coefficient[part, None] * problem.x[part])


def _inner_product(x: Tensor, gx: Tensor) -> Tensor:
    """`sum_i x_i · gx_i`: the scale's gradient, for free, because z is linear in both x and scale."""
    total = gx.new_zeros(())
    for part in row_slices(x):
        total += (x[part] * gx[part]).sum()
    return total
