"""Every exchange of the library but the agreement before it. Each rank holds rows and columns of its own; `lap` shows
it every rank's columns.

The contract: the mean over ranks of the returned losses is the global loss, so data-parallel averaging of gradients
gives exactly the single-process gradient of every parameter. Without an exchange nothing is communicated.

Shapes: n_local rows and m_local columns of this rank, m columns of all ranks, m_b columns of a visiting block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..indexing import scatter_sum
from . import torch_private
from .exchange import Layout
from .failures import failure_told, in_phase, wait

Visit = Callable[[int, list[Tensor]], list[Tensor]]
Merge = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def as_sent(embedding: Tensor, layout: Layout) -> Tensor:
    """An embedding as other ranks will see it; its owner uses the same."""
    dtype = None if layout.exchange is None else layout.exchange.dtype
    return embedding if dtype is None else embedding.to(dtype)


def lap(operands: Sequence[Tensor], visit: Visit, layout: Layout, merge: Merge | None = None) -> list[Tensor]:
    """Show every rank's columns to every rank once.

    operands  this rank's column operands, (m_local, ...) each; alike on every rank but for m_local
    visit     called with the first global column of a block and the block's operands (m_b, ...); returns this rank's
              contributions to the block's columns, (m_b, ...) each. A block may be without columns
    merge     combines two ranks' contributions, and may write into the first; None: their sum

    Returns every rank's contributions to this rank's own columns, (m_local, ...) each.
    """
    if layout.exchange is None:
        return visit(0, list(operands))
    exchange, operands = layout.exchange, [operand.contiguous() for operand in operands]

    def guarded_visit(start: int, block: list[Tensor]) -> list[Tensor]:
        with failure_told(exchange):
            return visit(start, block)

    if exchange.plan == "gather":
        return _gather_lap(operands, guarded_visit, layout, merge)
    return _ring_lap(operands, guarded_visit, layout, merge or _sum)


def _sum(ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
    return [a.add_(b) for a, b in zip(ours, theirs, strict=True)]


def _gather_lap(operands: Sequence[Tensor], visit: Visit, layout: Layout, merge: Merge | None) -> list[Tensor]:
    results = visit(0, [_gather(operand, layout.column_counts, layout) for operand in operands])
    last = max((k for k, result in enumerate(results) if _travels(result)), default=None)
    if merge is None:
        return [_reduce_scatter(result, layout, k == last) for k, result in enumerate(results)]
    phase = "returning column statistics"
    parts = [_to_owners(result, layout, phase, k == last) for k, result in enumerate(results)]
    total = [part[0] for part in parts]
    for rank in range(1, layout.world_size):
        total = merge(total, [part[rank] for part in parts])
    return total


def _ring_lap(operands: Sequence[Tensor], visit: Visit, layout: Layout, merge: Merge) -> list[Tensor]:
    """In step s this rank holds the block of the rank s places before it, while the next one is on its way. What the
    ranks contribute to a block follows one step behind the block itself: it leaves with the next step's exchange and
    reaches the next rank while that one computes its own contribution. Each travels world_size - 1 hops."""
    world, me = layout.world_size, _rank(layout)
    starts = [sum(layout.column_counts[:rank]) for rank in range(world)]
    held, own, finished = list(operands), list[Tensor](), list[Tensor]()
    for step in range(world):
        owner = (me - step) % world
        leaving, arriving = list[Tensor](), list[Tensor]()
        incoming, theirs = list[Tensor](), list[Tensor]()
        if step < world - 1:
            incoming = _like(operands, layout.column_counts[owner - 1])
            leaving, arriving = leaving + held, arriving + incoming
        if step >= 2:
            theirs = _like(own, layout.column_counts[owner])
            leaving, arriving = leaving + finished, arriving + theirs
        requests = _pass_on(leaving, arriving, layout, step)
        contribution = visit(starts[owner], held)
        _complete(requests, layout, step)
        if step == 0:
            own = contribution
        finished = merge(contribution, theirs) if theirs else contribution
        held = incoming
    theirs = _like(own, layout.m_local)
    _complete(_pass_on(finished, theirs, layout, world), layout, world)
    return merge(own, theirs) if own else []


def _like(templates: Sequence[Tensor], length: int) -> list[Tensor]:
    return [template.new_empty(length, *template.shape[1:]) for template in templates]


def _pass_on(leaving: list[Tensor], arriving: list[Tensor], layout: Layout, step: int) -> list[Any]:
    """Send to the next rank and receive from the one before, all at once; both sides leave out what is empty."""
    assert layout.exchange is not None
    group, world, me = layout.exchange.group, layout.world_size, _rank(layout)
    after, before = (dist.get_global_rank(group, (me + way) % world) for way in (1, -1))
    sends = [(dist.isend, tensor.contiguous(), after) for tensor in leaving]
    receives = [(dist.irecv, tensor, before) for tensor in arriving]
    operations = [
        dist.P2POp(act, tensor, peer, group, tag)
        for kind in (sends, receives)
        for tag, (act, tensor, peer) in enumerate(kind)
        if tensor.numel()
    ]
    with in_phase(_ring_phase(layout, step), layout.exchange):
        return dist.batch_isend_irecv(operations) if operations else []


def _complete(requests: list[Any], layout: Layout, step: int) -> None:
    assert layout.exchange is not None
    with in_phase(_ring_phase(layout, step), layout.exchange):
        for request in requests:
            wait(request, layout.exchange, layout.device, last=step == layout.world_size)


def _ring_phase(layout: Layout, step: int) -> str:
    world, me = layout.world_size, _rank(layout)
    return f"ring hop {step + 1} of {world + 1}, from rank {(me - 1) % world} and to rank {(me + 1) % world}"


def gather_rows(tensor: Tensor, layout: Layout) -> Tensor:
    """Every rank's share of a row operand (n_local, ...) as one (n, ...) tensor. For vectors; not differentiable."""
    return tensor if layout.exchange is None else _gather(tensor, layout.row_counts, layout)


def gather_columns(tensor: Tensor, layout: Layout) -> Tensor:
    """The same for a column operand: (m_local, ...) to (m, ...)."""
    return tensor if layout.exchange is None else _gather(tensor, layout.column_counts, layout)


def sum_to_columns(values: Tensor, index: Tensor, layout: Layout, own: bool = False) -> Tensor:
    """The sum of the values (n_local,) of all ranks' rows whose index (n_local,) names each of this rank's columns:
    (m_local,), differentiable. `own`: every rank's rows name its own columns only, so nothing needs to travel."""
    if own or layout.exchange is None:
        return scatter_sum(layout.m_local, index - layout.column_start, values)
    return _SumToColumns.apply(values, index, layout)


def sum_columns(values: Tensor, layout: Layout) -> Tensor:
    """The sum over ranks of a vector (m,) of all columns, this rank's part of it: (m_local,). Not differentiable."""
    if layout.exchange is None:
        return values
    total = values.clone()
    with in_phase("sum over ranks of column values", layout.exchange):
        wait(dist.all_reduce(total, group=layout.exchange.group, async_op=True), layout.exchange, layout.device)
    return total[layout.own_columns]


def max_to_columns(values: Tensor, index: Tensor, layout: Layout) -> Tensor:
    """The greatest of the values (n_local,) of all ranks' rows whose index names each of this rank's columns, -inf
    where there is none: (m_local,), not differentiable."""
    best = values.new_full((layout.m,), -torch.inf).scatter_reduce(0, index, values.detach(), "amax")
    if layout.exchange is not None:
        with in_phase("maximum over ranks of column values", layout.exchange):
            work = dist.all_reduce(best, dist.ReduceOp.MAX, group=layout.exchange.group, async_op=True)
            wait(work, layout.exchange, layout.device)
    return best[layout.own_columns]


class _SumToColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(index)
        return sum_columns(scatter_sum(layout.m, index, values), layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return gather_columns(gradients[0], ctx.layout)[index], None, None


def _gather(tensor: Tensor, counts: tuple[int, ...], layout: Layout) -> Tensor:
    """Shares of counts[rank] rows as one tensor; on the way padded to the longest, as collectives want equal ones."""
    assert layout.exchange is not None
    longest = max(counts)
    buffer = tensor.new_empty(len(counts) * longest, *tensor.shape[1:])
    with in_phase("gathering columns", layout.exchange):
        wait(
            torch_private.all_gather_into(buffer, _padded(tensor, longest), group=layout.exchange.group, async_op=True),
            layout.exchange,
            layout.device,
        )
    if min(counts) == longest:
        return buffer
    return torch.cat([part[:count] for part, count in zip(buffer.split(longest), counts, strict=True)])


def _reduce_scatter(tensor: Tensor, layout: Layout, last: bool) -> Tensor:
    """The sum over ranks of a tensor (m, ...) of all columns, this rank's part of it: (m_local, ...)."""
    assert layout.exchange is not None
    phase = "reducing column gradients"
    if torch_private.is_gloo(layout.exchange.group, layout.device):
        # Gloo's own is an all-reduce of a copy: twice the bytes, and a wait for it knows the group's time-out only.
        parts = _to_owners(tensor, layout, phase, last)
        total = parts[0].clone()  # a view would keep the parts of all ranks
        for part in parts[1:]:
            total += part
        return total
    counts, longest = layout.column_counts, max(layout.column_counts)
    if min(counts) < longest:
        tensor = torch.cat([_padded(part, longest) for part in tensor.split(counts)])
    result = tensor.new_empty(longest, *tensor.shape[1:])
    with in_phase(phase, layout.exchange):
        work = torch_private.reduce_scatter_into(
            result, tensor.contiguous(), group=layout.exchange.group, async_op=True
        )
        wait(work, layout.exchange, layout.device, last)
    return result[: layout.m_local]


def _to_owners(tensor: Tensor, layout: Layout, phase: str, last: bool) -> Tensor:
    """From (m, ...), a contribution to all columns, to every rank's contributions to this rank's columns, in rank
    order: (world_size, m_local, ...)."""
    assert layout.exchange is not None
    result = tensor.new_empty(layout.world_size, layout.m_local, *tensor.shape[1:])
    if not _travels(tensor):
        return result
    received, sent = [layout.m_local] * layout.world_size, list(layout.column_counts)
    with in_phase(phase, layout.exchange):
        work = dist.all_to_all_single(
            result.flatten(0, 1), tensor.contiguous(), received, sent, group=layout.exchange.group, async_op=True
        )
        wait(work, layout.exchange, layout.device, last)
    return result


def _travels(tensor: Tensor) -> bool:
    """Whether there is anything in it, for whatever number of columns."""
    return 0 not in tensor.shape[1:]


def _padded(tensor: Tensor, length: int) -> Tensor:
    if len(tensor) == length:
        return tensor.contiguous()
    padded = tensor.new_zeros(length, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded


def _rank(layout: Layout) -> int:
    assert layout.exchange is not None
    return dist.get_rank(layout.exchange.group)
