"""The two custom operators. torch.compile and the dispatcher see one opaque call each; the backend is chosen inside.

    softclip::forward (problem, backend)                                         -> Statistics.tensors()
    softclip::backward(problem, backend, Statistics, StatisticsGradient, flags)  -> dx, dy, dscale

Operators take flat arguments. Both schemas are made from the fields of Problem, so a new operand of a problem reaches
the backends without an edit here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from . import backends, positives
from .indexing import row_slices
from .problem import PROBLEM_TENSORS, Problem
from .stats import Statistics, StatisticsGradient

InputGradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # dx, dy and dscale, None where not needed

_REQUIRED = {each.name for each in fields(Problem) if each.default is MISSING}
_PROBLEM = ", ".join(f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in PROBLEM_TENSORS)
_PROBLEM += ", Tensor?[] teacher_tensors, int[] teacher_sources"
_PROBLEM_ARGUMENTS = len(PROBLEM_TENSORS) + 2
_FORWARD = f"({_PROBLEM}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"({_PROBLEM}, str backend, Tensor rows, Tensor columns, Tensor positive_logit, Tensor grad_rows, "
    "Tensor grad_columns, Tensor grad_positive_logit, bool[] needs_input_grad, bool rounded) "
    "-> (Tensor, Tensor, Tensor)"
)


def pack(tensors: Sequence[Tensor | None], sources: Sequence[int]) -> list[Any]:
    """Problem.tensors() and Problem.sources() as the operators' leading arguments."""
    own = len(PROBLEM_TENSORS)
    return [*tensors[:own], list(tensors[own:]), list(sources)]


def unpack(arguments: Sequence[Any]) -> tuple[Problem, Sequence[Any]]:
    """The problem, and the arguments after it."""
    *own, teacher_tensors, sources = arguments[:_PROBLEM_ARGUMENTS]
    return Problem.of([*own, *teacher_tensors], sources), arguments[_PROBLEM_ARGUMENTS:]


@torch.library.custom_op("softclip::forward", mutates_args=(), schema=_FORWARD)
def forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (backend,) = unpack(arguments)
    return backends.select(backend, problem).forward(problem).tensors()


@forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    problem, _ = unpack(arguments)
    return Statistics.empty(problem).tensors()


@torch.library.custom_op("softclip::backward", mutates_args=(), schema=_BACKWARD)
def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """dscale, and dx and dy unless `rounded` to the dtype of x and y, have the accumulation dtype. One that is not
    needed is empty, (0,)."""
    problem, (backend, *tensors, needs_input_grad, rounded) = unpack(arguments)
    statistics, gradient = Statistics.of(*tensors[:3]), StatisticsGradient(*tensors[3:])
    given = block_backward(problem, statistics, gradient, needs_input_grad, backend)
    results = [problem.scale.new_empty(0) if result is None else result for result in given]
    del given
    # Rounded one after the other, each sum released at once: they are larger than what they are rounded to.
    for index, dtype in enumerate((problem.x.dtype, problem.y.dtype) if rounded else ()):
        results[index] = results[index].to(dtype)
    return tuple(results)


@backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (_, *_, needs_input_grad, rounded) = unpack(arguments)
    wide = problem.accumulation_dtype
    dtypes = (problem.x.dtype, problem.y.dtype, wide) if rounded else (wide, wide, wide)
    operands = (problem.x, problem.y, problem.scale)
    return tuple(
        operand.new_empty(operand.shape if needed else 0, dtype=dtype)
        for operand, dtype, needed in zip(operands, dtypes, needs_input_grad, strict=True)
    )


def block_backward(
    problem: Problem,
    statistics: Statistics,
    gradient: StatisticsGradient,
    needs_input_grad: Sequence[bool],
    backend: str,
) -> InputGradients:
    """The backward operator on a block: dx (N, D), dy (M, D) and dscale in the accumulation dtype, so that blocks may
    be added before anything is rounded. `needs_input_grad`: of x, y and scale; one that is not needed is None, and the
    matrix product it would take is not made."""
    needs_x, needs_y, needs_scale = needs_input_grad
    # z is linear in x, in y and in scale, so the scale's gradient follows from either product.
    products = (needs_x or (needs_scale and not needs_y), needs_y)
    with torch.autocast(problem.x.device.type, enabled=False):
        gx, gy = backends.select(backend, problem).backward(problem, statistics, gradient, products)
        if problem.positive_column is not None:
            positives.add_gradient(problem, positives.gradient(problem, statistics, gradient), gx, gy)
        dscale = None
        if needs_scale:
            dscale = _inner_product(problem.x, gx) if gx is not None else _inner_product(problem.y, gy)
        return (
            gx.mul_(problem.scale) if gx is not None and needs_x else None,
            gy.mul_(problem.scale) if gy is not None else None,
            dscale,
        )


def _inner_product(embedding: Tensor, product: Tensor | None) -> Tensor:
    """`sum_i x_i · (G y)_i`, or the same of y and `G.T @ x`: the gradient of the scale."""
    assert product is not None
    total = product.new_zeros(())
    for part in row_slices(embedding):
        total += (embedding[part] * product[part]).sum()
    return total


def without_graph(gradients: Sequence[Tensor | None], operands: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as they are; but where autograd is recording, differentiating them again is an error. (PyTorch's
    once_differentiable says so only where the incoming gradients require a gradient, and else returns constants.)"""
    return _Constant.apply(len(gradients), *gradients, *operands) if torch.is_grad_enabled() else tuple(gradients)


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("the loss is once_differentiable: its gradient comes from a kernel, which has no gradient")
