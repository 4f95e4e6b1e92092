"""When an exchange fails, ranks find out who is missing.

Every rank whose exchange failed answers a roll call over the group's store, so that the error it raises names the ranks
that do not, and what those that failed have said of it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import torch_private
from .exchange import Exchange

NO_STORE = "missing: whoever holds the group's store, which does not answer (rank 0, or the launcher)"
ROLL_CALL = 2.0  # seconds that the other ranks have to say that they too are alive, once an exchange has failed
ANSWER = 4096  # characters of what a failed rank says; what is longer is cut off
HERE = "is here"

_roll_calls: Counter[str] = Counter()  # by group: what was said in one must not answer the next


def wait(work: Any, exchange: Exchange, device: torch.device, last: bool = False) -> None:
    """Until the result of an exchange on `device` may be used. Gloo waits here in any case. Elsewhere work is queued,
    and a wait with a time-out would poll until the queue is empty before anything else can be queued: there only the
    `last` exchange of a lap is waited for with a time-out. Exchanges end in order, so that one tells of all before."""
    if exchange.wait_limit is None or not (last or torch_private.is_gloo(exchange.group, device)):
        work.wait()
    else:
        work.wait(exchange.wait_limit)


@contextmanager
def in_phase(phase: str, exchange: Exchange) -> Iterator[None]:
    """Names rank, step, phase and the ranks that are missing in whatever error the transport raises."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{where(phase, exchange)}: {_missing(exchange)}: {error}") from error


def where(phase: str, exchange: Exchange) -> str:
    """Who speaks, for an error message: rank, step and phase."""
    rank, world = dist.get_rank(exchange.group), dist.get_world_size(exchange.group)
    step = "" if exchange.step is None else f", step {exchange.step}"
    return f"softclip_kernels, rank {rank} of {world}{step}, {phase}"


@contextmanager
def failure_told(exchange: Exchange) -> Iterator[None]:
    """For what a rank computes in the middle of an exchange: where it raises, tells the other ranks why, so that they
    stop at once instead of timing out. The group is unusable afterwards."""
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
        store = torch_private.store()
        call = f"softclip_kernels/failed/{group.group_name}/{_roll_calls[group.group_name]}"
        store.set(f"{call}/{dist.get_rank(group)}", answer[:ANSWER])
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
