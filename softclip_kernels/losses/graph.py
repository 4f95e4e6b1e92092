"""The loss over ranks in a compiled graph: two operators, which hold everything that ranks exchange.

    softclip::over_ranks         (a request)            -> loss, or row and column losses; retrieval ranks; a ticket
    softclip::over_ranks_backward(its tensors, ticket)  -> the gradients of x, y and the logit scale

Shapes, plans and errors depend on what other ranks bring, so no compiler could trace them. The operators run the eager
loss: the same collectives in the same order, the same numbers, and an error on one rank is an error on all. A graph
holds a request as its tensors, its numbers, and the name of its form: all else, the group by its own name. The eager
graph of the forward pass lives as long as the ticket, a tensor that the compiled backward pass keeps.

Imported while a program is traced, never by the eager loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..distributed import torch_private
from ..distributed.exchange import Exchange
from ..problem import accumulation_dtype
from .softmax import Losses, Request, RetrievalRanks, run

# A request taken apart, and put together again.


# Of a dataclass (itself, its fields' forms), of a tuple or list (tuple, the items' forms), else one of LEAVES and its
# place in the list of those, or the constant. Plain tuples, which a compiler takes for constants.
_Form = tuple[Any, tuple[Any, ...]]
LEAVES = ("tensor", "float", "integer", "constant")

_forms: dict[str, _Form] = {}


def _taken_apart(value: Any, tensors: list[Tensor], floats: list[float], integers: list[int]) -> _Form | None:
    """Traced. None where it holds what no graph can carry, such as a function."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor", (len(tensors) - 1,)
    if value is None or isinstance(value, (str, bool, torch.dtype)):
        return "constant", (value,)
    if isinstance(value, float):
        floats.append(value)
        return "float", (len(floats) - 1,)
    if isinstance(value, int):
        integers.append(value)
        return "integer", (len(integers) - 1,)
    if isinstance(value, (tuple, list)):
        kind, given = tuple, list(value)
    elif hasattr(type(value), "__dataclass_fields__"):
        kind, given = type(value), [getattr(value, each.name) for each in fields(value)]
    else:
        return None
    parts = [_taken_apart(each, tensors, floats, integers) for each in given]
    return None if None in parts else (kind, tuple(parts))


@torch.compiler.assume_constant_result
def _name(form: _Form) -> str:
    """What stands for the form in graphs: the same in every process, for caches of compiled code."""
    text = _spelled(form)
    for number in count():
        name = f"{text} #{number}" if number else text  # where two classes have one name
        if _forms.setdefault(name, form) == form:
            return name
    raise AssertionError


def _spelled(form: _Form) -> str:
    kind, parts = form
    if kind in LEAVES:
        return repr(parts[0]) if kind == "constant" else f"{kind} {parts[0]}"
    inside = ", ".join(map(_spelled, parts))
    return f"({inside})" if kind is tuple else f"{kind.__module__}.{kind.__qualname__}({inside})"


def _put_together(form: _Form, tensors: Sequence[Tensor], floats: Sequence[float], integers: Sequence[int]) -> Any:
    kind, parts = form
    if kind == "constant":
        return parts[0]
    if kind in LEAVES:
        return {"tensor": tensors, "float": floats, "integer": integers}[kind][parts[0]]
    values = [_put_together(part, tensors, floats, integers) for part in parts]
    if kind is tuple:
        return tuple(values)
    made = object.__new__(kind)  # without its checks, which the one that was traced has passed
    for each, value in zip(fields(kind), values, strict=True):
        object.__setattr__(made, each.name, value)
    return made


# The operators.


class _Kept(bytearray):
    """The memory of a ticket, and with it what the backward pass needs: held by whoever holds the ticket."""

    outputs: tuple[Tensor, ...] = ()  # of the eager graph
    leaves: Sequence[Tensor] = ()
    given: list[Tensor]  # the operator's operands, while a backward pass lasts


_numbers = count(1)
_kept: WeakValueDictionary[int, _Kept] = WeakValueDictionary()


def _ticket() -> tuple[_Kept, Tensor]:
    number = next(_numbers)
    kept = _kept[number] = _Kept(number.to_bytes(8, "little"))
    return kept, torch.frombuffer(kept, dtype=torch.int64)


@torch.library.custom_op(
    "softclip::over_ranks",
    mutates_args=(),
    schema="(Tensor[] tensors, float[] floats, SymInt[] integers, str form, bool[] learning) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def over_ranks(
    tensors: Sequence[Tensor],
    floats: Sequence[float],
    integers: Sequence[int],
    form: str,
    learning: Sequence[bool],
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_(learns) for tensor, learns in zip(tensors, learning, strict=True)]
    request: Request = _put_together(_forms[form], leaves, floats, integers)
    request = replace(request, group=replace(request.group, group=torch_private.group_named(request.group.group)))
    x, given = tensors[0], list[Tensor]()
    with torch_private.recording(), torch.set_grad_enabled(any(learning)), _by_reference(tensors, given):
        loss, ranks = run(request)
    outputs = tuple(loss) if isinstance(loss, Losses) else (loss, loss.new_empty(0))
    counted = (torch.empty(0, dtype=torch.int64, device=x.device) for _ in range(2)) if ranks is None else ranks
    kept, ticket = _ticket()
    if any(learning):
        kept.outputs = outputs[: 1 if isinstance(loss, Tensor) else 2]
        kept.leaves, kept.given = [leaf for leaf in leaves if leaf.requires_grad], given
    return *(each.detach().clone() for each in outputs), *counted, ticket


@over_ranks.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, floats, integers, form, _ = arguments
    # A request that does not fit has a result as well, so that every rank hears of it when the operator runs.
    request: Request = _put_together(_forms[form], tensors, floats, integers)
    n, m = (each.shape[0] if isinstance(each, Tensor) and each.dim() else 0 for each in (request.x, request.y))
    like = tensors[0].new_empty(0, dtype=accumulation_dtype(tensors[0].dtype))
    losses = (n, m) if request.reduction == "none" else ((), 0)
    counted = (n, m) if request.ranked else (0, 0)
    return (
        *(like.new_empty(shape) for shape in losses),
        *(like.new_empty(length, dtype=torch.int64) for length in counted),
        torch.empty(1, dtype=torch.int64),
    )


@torch.library.custom_op(
    "softclip::over_ranks_backward",
    mutates_args=(),
    schema="(Tensor[] tensors, Tensor ticket, Tensor[] gradients, bool[] learning) -> (Tensor, Tensor, Tensor)",
)
def over_ranks_backward(
    tensors: Sequence[Tensor], ticket: Tensor, gradients: Sequence[Tensor], learning: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients of x, y and the logit scale; one that is not wanted is empty, (0,)."""
    kept = _kept.get(int(ticket))
    if kept is None:
        raise RuntimeError(
            "what the loss over ranks keeps for its backward pass is gone: it lives as long as the tensor that stands "
            "for it in the compiled graph, which was copied; allowed: no hooks of saved tensors that copy them"
        )
    kept.given[:] = tensors
    try:
        with torch_private.recording():
            results = torch.autograd.grad(kept.outputs, kept.leaves, gradients[: len(kept.outputs)], retain_graph=True)
    finally:
        kept.given.clear()
    found = iter(results)
    return tuple(
        next(found).contiguous() if k < len(learning) and learning[k] else tensors[0].new_empty(0) for k in range(3)
    )


@over_ranks_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, _, _, learning = arguments
    wanted = [k < len(learning) and learning[k] for k in range(3)]
    return tuple(tensors[k].new_empty(tensors[k].shape) if wanted[k] else tensors[0].new_empty(0) for k in range(3))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, _, _, _, ctx.learning = inputs
    ctx.save_for_backward(*tensors, output[-1])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    *tensors, ticket = ctx.saved_tensors
    results = over_ranks_backward(tensors, ticket, list(gradients[:2]), ctx.learning)
    given = [results[k] if k < 3 and learns else None for k, learns in enumerate(ctx.learning)]
    return given, None, None, None, None


over_ranks.register_autograd(_backward, setup_context=_setup)
torch_private.keep_in_order(torch.ops.softclip.over_ranks.default)
torch_private.keep_in_order(torch.ops.softclip.over_ranks_backward.default)


def _by_reference(tensors: Sequence[Tensor], given: list[Tensor]) -> AbstractContextManager[None]:
    """Of what autograd saves, the operator's own operands are not kept but taken from those `given` to the backward
    pass: to a compiler their memory is free as soon as the operator has run."""
    operands = [(tensor, tensor.untyped_storage().data_ptr()) for tensor in tensors]

    def pack(saved: Tensor) -> Tensor | int:
        memory = saved.untyped_storage().data_ptr()
        for k, (tensor, own) in enumerate(operands):
            if memory == own and memory:
                return k if _same_view(saved, tensor) else saved.clone()
        return saved

    def unpack(saved: Tensor | int) -> Tensor:
        return given[saved] if isinstance(saved, int) else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _same_view(a: Tensor, b: Tensor) -> bool:
    def view(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    return view(a) == view(b)


# While tracing.


def run_in_graph(request: Request, exchange: Exchange) -> tuple[Any, Any]:
    """softmax.run as one node of a graph. Traced."""
    tensors: list[Tensor] = []
    floats, integers = [0.0], [0]  # never empty: register_autograd takes empty lists for lists of tensors
    named = replace(request, group=replace(exchange, group=exchange.group.group_name))
    form = _taken_apart(named, tensors, floats, integers)
    if form is None:
        return torch.compiler.disable(run)(request)
    operands = sum(isinstance(each, Tensor) for each in (request.x, request.y, request.logit_scale))
    recording = torch.is_grad_enabled()
    learning = [recording and k < operands and tensor.requires_grad for k, tensor in enumerate(tensors)]
    rows, columns, row_ranks, column_ranks, _ = over_ranks(tensors, floats, integers, _name(form), learning)
    loss = Losses(rows, columns) if request.reduction == "none" else rows
    return loss, RetrievalRanks(row_ranks, column_ranks) if request.ranked else None
