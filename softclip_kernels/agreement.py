"""Before any exchange, ranks agree that it can be made; when one fails, they find out who is missing.

A rank that waits for another which raised, or was given other shapes, would wait for ever. So whatever may raise runs
inside `agree`, which is followed by one all-gather of a fixed size; nothing else is exchanged until every rank has said
that it is well and that its operands fit. What fails after that, in the middle of an exchange, is told in a roll call.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Exchange, Layout
from .problem import Problem, accumulation_dtype

T = TypeVar("T")

# The gather plan's buffers are bounded by this; beyond it, `auto` takes the ring. Above some tens of MiB a link is busy
# with payload rather than with latency, so nothing is lost by cutting the exchange into blocks.
GATHER_LIMIT = 256 * 2**20
NO_STORE = "missing: whoever holds the group's store, which does not answer (rank 0, or the launcher)"
ROLL_CALL = 2.0  # seconds that the other ranks have to say that they too are alive, once an exchange has failed
TEXT = 4096  # bytes of a text that ranks exchange; what is longer is cut off
HERE = "is here"

logger = logging.getLogger("softclip_kernels")
_announced: set[str] = set()
_roll_calls: Counter[str] = Counter()  # by group: what was said in one must not answer the next
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
        wait(all_gather_into(everyone.view(-1), mine, group=exchange.group, async_op=True), exchange, mine.device, True)
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
    """The layout of this rank's x (n_local, D) and y (m_local, D), its plan not yet decided. Raises on all ranks alike
    where `check` raises on one, or where widths, dtypes or plans differ."""
    if exchange is None:
        check()
        return Layout(len(x), len(y), len(x), len(y), 0, 0, accumulation_dtype(x.dtype), x.device)

    def describe(_: None) -> list[int]:
        _check_device(x.device, exchange)
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
        exchange=exchange,
        row_counts=tuple(rows),
        column_counts=tuple(columns),
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
    """The layout with a plan: what the exchange takes is known once the target is. Alike on every rank."""
    exchange = layout.exchange
    if exchange is None:
        return layout
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
    if torch.device("cpu") in group._device_types:
        return torch.device("cpu")
    kind = group._device_types[-1].type
    return group.bound_device_id or torch.device(kind, torch.get_device_module(kind).current_device())


def _check_device(device: torch.device, exchange: Exchange) -> None:
    """A rank with its integers on one GPU and its embeddings on another would meet another rank on the first."""
    kinds = sorted(one.type for one in exchange.group._device_types)
    if device.type not in kinds:
        raise ValueError(f"x is on {device}; allowed: a device that the group exchanges on, {' or '.join(kinds)}")
    control = _control_device(exchange)
    if control.type == device.type != "cpu" and control != device:
        raise ValueError(
            f"x is on {device}, but the group exchanges on {control}; call torch.{device.type}.set_device before the "
            f"process group is made, with the device of this rank"
        )


def _exchange_texts(text: str, phase: str, exchange: Exchange) -> list[str]:
    """Every rank's text."""
    mine = torch.frombuffer(bytearray(text.encode()[:TEXT].ljust(TEXT, b"\0")), dtype=torch.uint8)
    mine = mine.to(_control_device(exchange))
    everyone = mine.new_empty(dist.get_world_size(exchange.group), TEXT)
    with in_phase(phase, exchange):
        wait(all_gather_into(everyone.view(-1), mine, group=exchange.group, async_op=True), exchange, mine.device, True)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in everyone.tolist()]


def over_gloo(exchange: Exchange, device: torch.device) -> bool:
    return exchange.group._get_backend(device).name() == "gloo"


def wait(work: Any, exchange: Exchange, device: torch.device, last: bool = False) -> None:
    """Until the result of an exchange on `device` may be used. Gloo waits here in any case. Elsewhere work is queued,
    and a wait with a time-out would poll until the queue is empty before anything else can be queued: there only the
    `last` exchange of a lap is waited for with patience. Exchanges end in order, so that one tells of all before it."""
    if exchange.patience is None or not (last or over_gloo(exchange, device)):
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


@contextmanager
def failure_told(exchange: Exchange) -> Iterator[None]:
    """For what a rank computes in the middle of an exchange: where it raises, the others hear of it now and hear why,
    instead of waiting for this rank until their time-out. The group is of no use afterwards."""
    try:
        yield
    except Exception as error:
        _missing(exchange, f"failed with {type(error).__name__}: {error}")
        raise


def _missing(exchange: Exchange, answer: str = HERE) -> str:
    """Which ranks do not take part in a roll call over the group's store: every rank whose exchange failed does, so the
    missing ones are dead, stopped or elsewhere. In a thread, because the store may be on the rank that is missing."""
    answers: list[str] = []
    _roll_calls[exchange.group.group_name] += 1
    thread = threading.Thread(target=lambda: answers.append(_roll_call(exchange, answer)), daemon=True)
    thread.start()
    _wake_others(exchange)
    thread.join(2 * ROLL_CALL)
    return answers[0] if answers else NO_STORE


def _roll_call(exchange: Exchange, answer: str) -> str:
    group = exchange.group
    missing = [rank for rank in range(dist.get_world_size(group)) if rank != dist.get_rank(group)]
    failed: list[str] = []
    try:
        store = dist.distributed_c10d._get_default_store()
        call = f"softclip_kernels/failed/{group.group_name}/{_roll_calls[group.group_name]}"
        store.set(f"{call}/{dist.get_rank(group)}", answer[:TEXT])
        deadline = time.monotonic() + ROLL_CALL
        while missing and time.monotonic() < deadline:
            time.sleep(0.02)
            for rank in [rank for rank in missing if store.check([f"{call}/{rank}"])]:
                missing.remove(rank)
                said = store.get(f"{call}/{rank}").decode(errors="replace")
                failed += [f"rank {rank} {said}"] * (said != HERE)
    except Exception:
        return NO_STORE
    if missing:
        failed.append(f"missing: {', '.join(f'rank {rank}' for rank in missing)}")
    return "; ".join(failed) or "every rank answers the roll call, so the transport failed or a rank was late"


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
