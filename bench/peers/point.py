"""One peer at one size: what its process does, one call after the other.

A peer that asks for more memory than it may gets an error, and the machine does not notice.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from softclip_kernels.testing import Result

from .. import memory, problems
from ..problems import Case, Loss
from . import losses
from .losses import Peer

CHECKED = 250  # rows on which a peer is held to the standard: few, for NTXentLoss needs N³


class _Point:
    """What this process measures."""

    def __init__(self, loss: Loss, case: Case) -> None:
        self._loss, self._case = loss, case
        self._operands = case.operands()
        self._found: tuple[Tensor | None, ...] = ()

    def gradient_bytes(self) -> int:
        return 2 * self._case.n * self._case.d * self._case.dtype.itemsize

    def run(self) -> float:
        """Seconds of forward + backward."""
        self._found = ()  # of the run before: what is alive twice would count twice
        start = time.perf_counter()
        self._found = losses.gradients(self._loss, self._operands)
        return time.perf_counter() - start

    def compare(self, expected: Result) -> tuple[float, str | None]:
        x, y, scale = (operand.detach() for operand in self._operands)
        found, self._found = losses.result(self._found, expected), ()
        errors = problems.relative_errors(found, expected, x, scale)
        return max(errors.values()), _said(
            lambda: problems.check_equal({"float32": expected, "it": found}, x, y, scale)
        )


_point: _Point | None = None


def ready(peer: Peer, case: Case, threads: int, limit: int) -> str | None:
    """Import what the peer needs, let it compile and start its threads, and hold it to the library's standard on
    CHECKED rows; from then on memory is limited. Returns None, or what is wrong."""
    global _point
    torch.set_num_threads(threads)
    small = replace(case, n=CHECKED)
    operands = small.operands()
    standard = losses.standard(peer.loss, *(operand.detach() for operand in operands))
    found = losses.result(losses.gradients(peer.make(small), operands), standard.exact)
    said = _said(lambda: standard.check(found))
    _point = _Point(peer.make(case), case)
    limit_memory(limit)
    return said


def first() -> tuple[float, float]:
    """Seconds of the first run, and the MiB by which it made the process grow, less the two gradients."""
    seconds: list[float] = []
    memory.give_back()
    grown = memory.growth(lambda: seconds.append(_known().run()))
    return seconds[0], (grown - _known().gradient_bytes()) / 2**20


def again() -> float:
    return _known().run()


def compare(path: Path) -> tuple[float, str | None]:
    """The last run against the result that `reference` wrote: the largest error of any field, relative to the field's
    largest entry, and None or what the library's bounds say of it."""
    return _known().compare(torch.load(path, weights_only=False))


def reference(case: Case, threads: int, path: Path) -> None:
    """Write down the result of this library's loss on the operands in float32, for `compare`."""
    torch.set_num_threads(threads)
    x, y, scale = (operand.detach().float() for operand in case.operands())
    torch.save(Result.of(losses.fused(replace(case, dtype=torch.float32)), x, y, scale), path)


def limit_memory(limit: int) -> None:
    """Let this process ask for so many more bytes."""
    allowed = memory.resident("VmSize") + limit
    resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _known() -> _Point:
    assert _point is not None, "ready comes first"
    return _point


def _said(check: Callable[[], object]) -> str | None:
    try:
        check()
    except AssertionError as error:
        return str(error)
    return None
