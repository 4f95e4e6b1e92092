"""Before any exchange, ranks agree that it can be made; when one fails, they find out who is missing.

A rank that waits for another which raised, or was given other shapes, would wait for ever. So whatever may raise runs
inside `agree`, which is followed by one all-gather of a fixed size; nothing else is exchanged until every rank has said
that it is well and that its operands fit.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Exchange, Layout
from .problem import accumulation_dtype

T = TypeVar("T")

# The gather plan's buffers are bounded by this; beyond it, `auto` takes the ring. Above some tens of MiB a link is busy
# with payload rather than with latency, so nothing is lost by cutting the exchange into blocks.
GATHER_LIMIT = 256 * 2**20
NO_STORE = "missing: whoever holds the group's store, which does not answer (rank 0, or the launcher)"
ROLL_CALL = 2.0  # seconds that the other ranks have to say that they too are alive, once an exchange has failed

logger = logging.getLogger("softclip_kernels")
_announced: set[str] = set()
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The newer name of the collective, where this PyTorch has it.
all_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def as_exchange(group: Any) -> Exchange | None:
    """The `group=` of the loss as an Exchange; None where there is nobody to exchange with."""
    if group is None:
        return None
    exchange = group if isinstance(group, Exchange) else Exchange(group)
    if exchange.group is None:
        exchange = replace(exchange, group=dist.group.WORLD)
    members = exchange.group
    if isinstance(members, int) and members == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not a member of group=; call the loss on the group's ranks only")
    if not isinstance(members, dist.ProcessGroup):
        raise TypeError(f"group is a {type(members).__name__}; allowed: None, a torch.distributed group, an Exchange")
    return exchange if dist.get_world_size(exchange.group) > 1 else None


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
    mine = torch.zeros(8, dtype=torch.int64)
    mine[: 1 + len(numbers)] = torch.tensor([error is not None, *numbers])
    mine = mine.to(_control_device(exchange))
    everyone = mine.new_empty(dist.get_world_size(exchange.group), 8)
    with in_phase(phase, exchange):
        wait(all_gather_into(everyone.view(-1), mine, group=exchange.group, async_op=True), exchange)
    table = everyone.tolist()
    failed = [rank for rank, row in enumerate(table) if row[0]]
    if failed:
        texts = _exchange_texts("" if error is None else f"{type(error).__name__}: {error}", phase, exchange)
        if error is not None:
            raise error
        raise RuntimeError(
            f"{_where(phase, exchange)}: " + "; ".join(f"rank {rank} failed with {texts[rank]}" for rank in failed)
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
        texts = _exchange_texts(text, phase, exchange)
        described = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(texts))
        raise ValueError(f"{_where(phase, exchange)}: every rank must bring the same, but there are {described}")
    return result


def make_layout(x: Tensor, y: Tensor, exchange: Exchange | None, check: Callable[[], None] = lambda: None) -> Layout:
    """The layout of this rank's x (n_local, D) and y (m_local, D). Raises on all ranks alike where `check` raises on
    one, or where widths, dtypes or plans differ."""
    if exchange is None:
        check()
        return Layout(len(x), len(y), len(x), len(y), 0, 0, accumulation_dtype(x.dtype), x.device)

    def describe(_: None) -> list[int]:
        wishes = f"{exchange.plan} {exchange.dtype}"
        return [len(x), len(y), x.shape[1], _DTYPES.index(x.dtype), zlib.crc32(wishes.encode())]

    _, table = agree(exchange, "agreement on shapes", check, describe)
    if len({tuple(row[2:]) for row in table}) > 1:
        own = f"D={x.shape[1]}, {x.dtype}, plan={exchange.plan!r}, exchange dtype {exchange.dtype}"
        texts = _exchange_texts(own, "agreement on shapes", exchange)
        described = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
        raise ValueError(f"every rank must bring embeddings of one width and dtype, but there are {described}")
    rank = dist.get_rank(exchange.group)
    rows, columns = [row[0] for row in table], [row[1] for row in table]
    return Layout(
        n=sum(rows),
        m=sum(columns),
        n_local=len(x),
        m_local=len(y),
        row_start=sum(rows[:rank]),
        column_start=sum(columns[:rank]),
        dtype=accumulation_dtype(x.dtype),
        device=x.device,
        exchange=replace(exchange, plan=_decide(exchange, columns, x)),
        row_counts=tuple(rows),
        column_counts=tuple(columns),
    )


def gather_bytes(columns: int, width: int, dtype: torch.dtype) -> int:
    """The gather plan's largest buffers: every column, and its gradient in the accumulation dtype."""
    return columns * width * (dtype.itemsize + accumulation_dtype(dtype).itemsize)


def _decide(exchange: Exchange, columns: Sequence[int], x: Tensor) -> str:
    if exchange.plan != "auto":
        return exchange.plan
    size = gather_bytes(sum(columns), x.shape[1], x.dtype)
    plan = "gather" if len(columns) == 2 or size <= GATHER_LIMIT else "ring"
    reason = (
        "2 ranks: the other's block is all there is"
        if len(columns) == 2
        else (
            f"gathered columns and gradients take {size / 2**20:.1f} MiB a rank; the ring begins above "
            f"{GATHER_LIMIT / 2**20:.0f} MiB"
        )
    )
    if f"{plan}{reason}" not in _announced:
        _announced.add(f"{plan}{reason}")
        logger.info("exchange plan %s chosen for %d columns on %d ranks (%s)", plan, sum(columns), len(columns), reason)
    return plan


def _control_device(exchange: Exchange) -> torch.device:
    """Where small integers are exchanged: on the CPU where the group can, so that no GPU is waited for."""
    devices = exchange.group._device_types
    return devices[-1] if torch.device("cpu") not in devices else torch.device("cpu")


def _exchange_texts(text: str, phase: str, exchange: Exchange) -> list[str]:
    texts: list[Any] = [None] * dist.get_world_size(exchange.group)
    with in_phase(phase, exchange):
        dist.all_gather_object(texts, text, group=exchange.group)
    return texts


def wait(work: Any, exchange: Exchange) -> None:
    if exchange.patience is None:
        work.wait()
    else:
        work.wait(exchange.patience)


@contextmanager
def in_phase(phase: str, exchange: Exchange) -> Iterator[None]:
    """Names rank, step, phase and the ranks that are missing in whatever error the transport raises."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{_where(phase, exchange)}: {_missing(exchange)}: {error}") from error


def _where(phase: str, exchange: Exchange) -> str:
    rank, world = dist.get_rank(exchange.group), dist.get_world_size(exchange.group)
    step = "" if exchange.step is None else f", step {exchange.step}"
    return f"softclip_kernels, rank {rank} of {world}{step}, {phase}"


def _missing(exchange: Exchange) -> str:
    """Which ranks do not take part in a roll call over the group's store: every rank whose exchange failed does, so the
    missing ones are dead, stopped or elsewhere. In a thread, because the store may be on the rank that is missing."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(_roll_call(exchange)), daemon=True)
    thread.start()
    _wake_others(exchange)
    thread.join(2 * ROLL_CALL)
    return answers[0] if answers else NO_STORE


def _roll_call(exchange: Exchange) -> str:
    group = exchange.group
    others = [rank for rank in range(dist.get_world_size(group)) if rank != dist.get_rank(group)]
    try:
        store = dist.distributed_c10d._get_default_store()
        keys = {rank: f"softclip_kernels/failed/{group.group_name}/{rank}" for rank in range(len(others) + 1)}
        store.set(keys[dist.get_rank(group)], "here")
        deadline = time.monotonic() + ROLL_CALL
        while others and time.monotonic() < deadline:
            time.sleep(0.02)
            others = [rank for rank in others if not store.check([keys[rank]])]
    except Exception:
        return NO_STORE
    if not others:
        return "every rank answers the roll call, so the transport failed or a rank was late"
    return f"missing: {', '.join(f'rank {rank}' for rank in others)}"


def _wake_others(exchange: Exchange) -> None:
    """A message that nobody receives: when it times out, gloo closes the connection, and a rank that waits for this one
    fails now instead of after its own time-out."""
    group = exchange.group
    if dist.get_backend(group) != "gloo":
        return
    others = [rank for rank in range(dist.get_world_size(group)) if rank != dist.get_rank(group)]
    for rank in others:
        try:
            work = dist.isend(torch.zeros(1), dist.get_global_rank(group, rank), group=group, tag=2**31 - 1)
            if work is not None:
                work.wait(timedelta(seconds=ROLL_CALL / 4 / len(others)))
        except RuntimeError:
            pass
