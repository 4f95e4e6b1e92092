"""Before any exchange, ranks agree that it can be made.

A rank that waits for another which raised, or was given other shapes, would wait for ever. So whatever may raise runs
inside `agree`, which is followed by one all-gather of a fixed size; nothing else is exchanged until every rank has said
that it is well and that its operands fit. What fails after that, in the middle of an exchange, is for `failures`.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..problem import Problem, accumulation_dtype
from . import torch_private
from .exchange import Exchange, Layout
from .failures import in_phase, wait, where

T = TypeVar("T")

# The gather plan's buffers are bounded by this; beyond it, `auto` takes the ring. Above some tens of MiB a link is busy
# with payload rather than with latency, so nothing is lost by cutting the exchange into blocks.
GATHER_LIMIT = 256 * 2**20
TEXT = 4096  # bytes of a text that ranks exchange; what is longer is cut off
NUMBERS = 8  # integers that every rank brings to an agreement, the first of them whether it failed

logger = logging.getLogger("softclip_kernels")
_announced: set[str] = set()
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def agree(
    exchange: Exchange, phase: str, act: Callable[[], T], describe: Callable[[T], Sequence[int]]
) -> tuple[T, list[list[int]]]:
    """`act()`, and what `describe` says of every rank's result: at most 7 integers, as many on every rank. Where either
    raises on one rank, every rank raises: the failing ones their own error, the others RuntimeError. One all-gather, of
    a fixed size, so that ranks may disagree about everything else."""
    result: Any = None
    error: Exception | None = None
    numbers: Sequence[int] = ()
    try:
        result = act()
        numbers = describe(result)
    except Exception as caught:
        error = caught
    local = torch.zeros(NUMBERS, dtype=torch.int64)
    local[: 1 + len(numbers)] = torch.tensor([error is not None, *numbers])
    table = all_gather(local, phase, exchange).tolist()
    failed = [rank for rank, row in enumerate(table) if row[0]]
    if failed:
        texts = _exchange_texts("" if error is None else f"{type(error).__name__}: {error}", phase, exchange)
        if error is not None:
            raise error
        raise RuntimeError(
            f"{where(phase, exchange)}: " + "; ".join(f"rank {rank} failed with {texts[rank]}" for rank in failed)
        )
    return result, [row[1 : 1 + len(numbers)] for row in table]


def agree_on_text(exchange: Exchange | None, phase: str, act: Callable[[], T], describe: Callable[[T], str]) -> T:
    """`act()`, and ValueError on all ranks alike where `describe` does not say the same of every rank's result."""
    if exchange is None:
        return act()
    text = ""

    def digest(result: T) -> list[int]:
        nonlocal text
        text = describe(result)
        return [zlib.crc32(text.encode())]

    result, digests = agree(exchange, phase, act, digest)
    if len({number for (number,) in digests}) > 1:
        described = _by_rank(text, phase, exchange)
        raise ValueError(f"{where(phase, exchange)}: every rank must bring the same, but there are {described}")
    return result


def make_layout(x: Tensor, y: Tensor, exchange: Exchange | None, check: Callable[[], None] = lambda: None) -> Layout:
    """The layout of this rank's x (n_local, D) and y (m_local, D), its plan not yet decided. Raises on all ranks alike
    where `check` raises on one, or where widths, dtypes or plans differ."""
    if exchange is None:
        check()
        return Layout(len(x), len(y), len(x), len(y), 0, 0, accumulation_dtype(x.dtype), x.device)

    def describe(_: None) -> list[int]:
        _check_device(x.device, exchange)
        options = zlib.crc32(f"{exchange.plan} {exchange.dtype}".encode())
        learns = torch.is_grad_enabled() and y.requires_grad
        return [len(x), len(y), learns, x.shape[1], _DTYPES.index(x.dtype), options]

    _, table = agree(exchange, "agreement on shapes", check, describe)
    if len({tuple(row[3:]) for row in table}) > 1:
        own = f"D={x.shape[1]}, {x.dtype}, plan={exchange.plan!r}, exchange dtype {exchange.dtype}"
        described = _by_rank(own, "agreement on shapes", exchange)
        raise ValueError(f"every rank must bring embeddings of one width and dtype, but there are {described}")
    rank = dist.get_rank(exchange.group)
    rows, columns, learn, *_ = zip(*table, strict=True)
    return Layout(
        n=sum(rows),
        m=sum(columns),
        n_local=len(x),
        m_local=len(y),
        row_start=sum(rows[:rank]),
        column_start=sum(columns[:rank]),
        dtype=accumulation_dtype(x.dtype),
        device=x.device,
        exchange=exchange,
        row_counts=rows,
        column_counts=columns,
        columns_learn=any(learn),
    )


def gather_bytes(problem: Problem, layout: Layout) -> int:
    """The gather plan's largest buffers: all columns' embeddings, the teachers' included, as they travel and, where
    that is another dtype, as they are computed with; and the columns' gradient in the accumulation dtype."""
    assert layout.exchange is not None
    column = problem.y.shape[1] * layout.dtype.itemsize
    for embedding in (problem.y, *(teacher.y for teacher in problem.teachers if teacher.y is not None)):
        dtypes = {embedding.dtype, layout.exchange.dtype or embedding.dtype}
        column += embedding.shape[1] * sum(dtype.itemsize for dtype in dtypes)
    return layout.m * column


def decide_plan(problem: Problem, layout: Layout) -> Layout:
    """The layout of an exchange with a plan: what it takes is known once the target is. Alike on every rank."""
    exchange = layout.exchange
    assert exchange is not None
    plan = exchange.plan
    if plan == "auto":
        size = gather_bytes(problem, layout)
        plan = "gather" if size <= GATHER_LIMIT else "ring"
        _announce(
            f"exchange plan {plan} chosen for {layout.m} columns on {layout.world_size} ranks (gathered columns and "
            f"gradients take {size / 2**20:.1f} MiB a rank; the ring begins above {GATHER_LIMIT / 2**20:.0f} MiB)"
        )
    if plan == "ring" and 0 in layout.column_counts and layout.device.type != _control_device(exchange).type:
        # A device's connections are made in its first exchange, for which they need every rank; a ring leaves out those
        # that have nothing to send, and all that was exchanged up to now went over the CPU.
        first = torch.zeros(1, device=layout.device)
        with in_phase("connecting", exchange):
            wait(dist.all_reduce(first, group=exchange.group, async_op=True), exchange, layout.device)
    return replace(layout, exchange=replace(exchange, plan=plan))


def _announce(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        logger.info(message)


def _control_device(exchange: Exchange) -> torch.device:
    """Where small integers are exchanged: on the CPU where the group can, so that no GPU is waited for; else on the
    device that the group is bound to, or the current one."""
    group = exchange.group
    if torch.device("cpu") in torch_private.device_types(group):
        return torch.device("cpu")
    kind = torch_private.device_types(group)[-1].type
    return group.bound_device_id or torch.device(kind, torch.get_device_module(kind).current_device())


def _check_device(device: torch.device, exchange: Exchange) -> None:
    """A rank with its integers on one GPU and its embeddings on another would meet another rank on the first."""
    kinds = sorted(kind.type for kind in torch_private.device_types(exchange.group))
    if device.type not in kinds:
        raise ValueError(f"x is on {device}; allowed: a device that the group exchanges on, {' or '.join(kinds)}")
    control = _control_device(exchange)
    if control.type == device.type != "cpu" and control != device:
        raise ValueError(
            f"x is on {device}, but the group exchanges on {control}; call torch.{device.type}.set_device before the "
            f"process group is made, with the device of this rank"
        )


def _by_rank(text: str, phase: str, exchange: Exchange) -> str:
    """Every rank's text, in one for an error message."""
    return "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(_exchange_texts(text, phase, exchange)))


def _exchange_texts(text: str, phase: str, exchange: Exchange) -> list[str]:
    """Every rank's text."""
    local = torch.frombuffer(bytearray(text.encode()[:TEXT].ljust(TEXT, b"\0")), dtype=torch.uint8)
    gathered = all_gather(local, phase, exchange).tolist()
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gathered]


def all_gather(local: Tensor, phase: str, exchange: Exchange) -> Tensor:
    """From a vector (length,) on every rank to all of them, (ranks, length)."""
    local = local.to(_control_device(exchange))
    gathered = local.new_empty(dist.get_world_size(exchange.group), len(local))
    with in_phase(phase, exchange):
        work = torch_private.all_gather_into(gathered.view(-1), local, group=exchange.group, async_op=True)
        wait(work, exchange, local.device, last=True)
    return gathered
