"""The block operations of the Triton backend, each a pass that may be replayed (replay.py)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import precision
from ...linear_form import LinearForms, ReducedGradient
from ...problem import Problem
from ...stats import InputGradients, Statistics, StatisticsGradient, Wanted
from . import replay, softmax_backward, softmax_forward
from .adjoint import adjoint
from .linear_forms import coefficients_of
from .reduced_loss import loss


def forward(problem: Problem) -> Statistics:
    def compute(_: tuple[float, ...]) -> Sequence[Tensor]:
        return _flat(softmax_forward.forward(problem))

    return _statistics(replay.run("forward", problem.tensors(), _settings(problem), compute))


def forward_and_loss(
    problem: Problem, forms: LinearForms, shares: tuple[float, float]
) -> tuple[Statistics, Tensor] | None:
    """None where the loss is left to PyTorch."""
    given = coefficients_of(problem, forms, shares, diagonal=False)
    if given is None:
        return None

    def compute(numbers: tuple[float, ...]) -> Sequence[Tensor]:
        statistics = softmax_forward.forward(problem)
        return [*_flat(statistics), loss(problem, statistics, given, numbers)]

    tensors, rest = (*problem.tensors(), *given.vectors), (_settings(problem), given.constants)
    *known, result = replay.run("forward and loss", tensors, rest, compute, given.numbers)
    assert result is not None
    return _statistics(known), result


def reduced(problem: Problem, statistics: Statistics, forms: LinearForms, shares: tuple[float, float]) -> Tensor | None:
    """None where it is left to PyTorch."""
    given = coefficients_of(problem, forms, shares, diagonal=False)
    if given is None:
        return None

    def compute(numbers: tuple[float, ...]) -> Sequence[Tensor]:
        return [loss(problem, statistics, given, numbers)]

    known = (statistics.rows.packed, statistics.columns.packed, statistics.positive_logit)
    tensors = (*known, given.positive_column, *given.vectors)
    return replay.run("loss", tensors, given.constants, compute, given.numbers)[0]


def backward(problem: Problem, statistics: Statistics, gradient: StatisticsGradient, wanted: Wanted) -> InputGradients:
    gradient = gradient.contiguous()

    def compute(_: tuple[float, ...]) -> InputGradients:
        return softmax_backward.backward(problem, statistics, gradient, wanted)

    tensors = (*problem.tensors(), *_known(statistics), *gradient)
    return InputGradients(*replay.run("backward", tensors, (_settings(problem), wanted), compute))


def backward_of_reduced(
    problem: Problem, statistics: Statistics, gradient: ReducedGradient, wanted: Wanted
) -> InputGradients:
    given = coefficients_of(problem, gradient.forms, gradient.shares, gradient.diagonal)
    if given is None:
        return backward(problem, statistics, gradient.multiplied(problem), wanted)

    def compute(numbers: tuple[float, ...]) -> InputGradients:
        multiplied = adjoint(problem, gradient.of_loss, given, numbers)
        return softmax_backward.backward(problem, statistics, multiplied, wanted)

    tensors = (*problem.tensors(), *_known(statistics), gradient.of_loss, *given.vectors)
    rest = (_settings(problem), wanted, gradient.diagonal, given.constants)
    return InputGradients(*replay.run("backward of the loss", tensors, rest, compute, given.numbers))


def _known(statistics: Statistics) -> tuple[Tensor, ...]:
    return statistics.rows.packed, statistics.columns.packed, statistics.positive_logit, statistics.scalars


def _flat(statistics: Statistics) -> list[Tensor]:
    return [*_known(statistics), statistics.row_ranks, statistics.column_ranks]


def _statistics(flat: Sequence[Any]) -> Statistics:
    rows, columns, positive_logit, scalars, row_ranks, column_ranks = flat
    return Statistics.of(rows, columns, positive_logit, row_ranks, column_ranks, scalars)


def _settings(problem: Problem) -> tuple[Hashable, ...]:
    """What the launches of a problem follow from, beside its tensors and the environment: the sources of teachers'
    logits, and torch's settings for products, where some are fp32."""
    single = problem.x.dtype == torch.float32
    for teacher in problem.teachers:
        single = single or (teacher.x is not None and teacher.x.dtype == torch.float32)
    return *problem.sources(), precision.rounds_operands(problem.x.device) if single else None
