"""The two custom operators. torch.compile and the dispatcher see one opaque call each; the backend is chosen inside.

    softclip::forward (problem, backend)                                         -> Statistics.tensors()
    softclip::backward(problem, backend, Statistics, StatisticsGradient, Wanted) -> InputGradients

Operators take flat arguments. Both schemas are made from the fields of Problem, so a new operand of a problem reaches
the backends without an edit here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .linear_form import ReducedGradient
from .precision import without_autocast
from .problem import PROBLEM_TENSORS, Problem
from .stats import InputGradients, Statistics, StatisticsGradient, Wanted

_REQUIRED = {each.name for each in fields(Problem) if each.default is MISSING}
_PROBLEM = ", ".join(f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in PROBLEM_TENSORS)
_PROBLEM += ", Tensor?[] teacher_tensors, int[] teacher_sources"
_PROBLEM_ARGUMENTS = len(PROBLEM_TENSORS) + 2
_FORWARD = f"({_PROBLEM}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"({_PROBLEM}, str backend, Tensor rows, Tensor columns, Tensor positive_logit, Tensor scalars, Tensor grad_rows, "
    "Tensor grad_columns, Tensor grad_positive_logit, bool[] wanted) "
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


def run_forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (backend,) = unpack(arguments)
    return backends.select(backend, problem).forward(problem).tensors()


def _forward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    problem, _ = unpack(arguments)
    return Statistics.empty(problem).tensors()


def run_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of Backend.backward; one that is not wanted is empty, (0,)."""
    problem, (backend, rows, columns, positive_logit, scalars, *gradients, wanted) = unpack(arguments)
    statistics, gradient = Statistics.of(rows, columns, positive_logit, scalars=scalars), StatisticsGradient(*gradients)
    results = block_backward(problem, statistics, gradient, Wanted(*wanted), backend)
    return tuple(problem.scale.new_empty(0) if result is None else result for result in results)


def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (_, *_, (*needed, rounded)) = unpack(arguments)
    wide = problem.accumulation_dtype
    dtypes = (problem.x.dtype, problem.y.dtype, wide) if rounded else (wide, wide, wide)
    operands = (problem.x, problem.y, problem.scale)
    return tuple(
        operand.new_empty(operand.shape if needed else 0, dtype=dtype)
        for operand, dtype, needed in zip(operands, dtypes, needed, strict=True)
    )


# Not torch.library.custom_op, whose checks at every call cost as much again as the call.
_library = torch.library.Library("softclip", "FRAGMENT")
for _name, _schema, _run, _shapes in (
    ("forward", _FORWARD, run_forward, _forward_shapes),
    ("backward", _BACKWARD, run_backward, _backward_shapes),
):
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"softclip::{_name}", _shapes, lib=_library)

forward = torch.ops.softclip.forward.default
backward = torch.ops.softclip.backward.default


def unwatched(problem: Problem, name: str) -> backends.Backend | None:
    """The backend where nothing watches, to be called without the operators: the dispatcher and what it makes of the
    arguments cost a small batch as much as its kernel, and an operator has neither what a forward keeps nor a backend's
    own `reduced`. None where something does."""
    return None if watched(problem.x) else backends.select(name, problem)


def statistics_of(problem: Problem, backend: str) -> Statistics:
    """The forward operator's."""
    return Statistics.of(*forward(*pack(problem.tensors(), problem.sources()), backend))


def gradients_of(
    problem: Problem,
    statistics: Statistics,
    gradient: ReducedGradient,
    needed: Sequence[bool],
    backend: str | backends.Backend,
) -> tuple[Tensor | None, ...]:
    """Rounded gradients of x, y and scale where they are needed, else None: the backward operator's, of the backend of
    this name, or those of the backend itself, which `unwatched` gave to the forward, where nothing watches now."""
    x, y, scale = needed
    if not isinstance(backend, str) and not watched(problem.x):
        wanted = Wanted(x, y, scale, rounded=True)
        with without_autocast(problem.x.device.type):
            if (backward_of_reduced := getattr(backend, "backward_of_reduced", None)) is not None:
                return backward_of_reduced(problem, statistics, gradient, wanted)
            return backend.backward(problem, statistics, gradient.multiplied(problem), wanted)
    name = backend if isinstance(backend, str) else backend.name
    known = (statistics.rows.packed, statistics.columns.packed, statistics.positive_logit, statistics.scalars)
    arguments = (*pack(problem.tensors(), problem.sources()), name, *known, *gradient.multiplied(problem))
    results = backward(*arguments, [*needed, True])
    return tuple(result if needs else None for result, needs in zip(results, needed, strict=True))


def watched(x: Any) -> bool:
    """Whether a compiler, a tracer or another dispatch mode, or a subclass of Tensor is to see the operators on x.
    torch._C._len_torch_dispatch_stack: torch 2.8 to 2.13."""
    plain = type(x) in (Tensor, nn.Parameter)
    return not plain or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def block_backward(
    problem: Problem, statistics: Statistics, gradient: StatisticsGradient, wanted: Wanted, backend: str
) -> InputGradients:
    """The backward operator on a block."""
    with without_autocast(problem.x.device.type):
        return backends.select(backend, problem).backward(problem, statistics, gradient, wanted)


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
