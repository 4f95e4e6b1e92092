"""What the loss costs the host on a GPU: forward and backward of the Triton backend, every launch stubbed.

python -m bench host               time and PyTorch's operators, a line for each loss and size

`passes` is the backend's forward and backward together, from the operands to the loss and from its gradient to theirs,
`whole` with the targets and autograd around them.
On the CPU's tensors, whose vectors PyTorch really computes on, so small sizes tell most. The driver's own time for a
launch comes on top of it.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softclip_kernels import backends
from softclip_kernels.backends.triton import TritonBackend
from softclip_kernels.linear_form import LinearForms, ReducedGradient
from softclip_kernels.problem import Problem
from softclip_kernels.stats import InputGradients, Statistics, StatisticsGradient, Wanted

from . import Row, stubbed
from .problems import LOSSES, Case
from .records import Record, table
from .timing import Timing, forward_backward

SIZES = ((256, 512), (1024, 512), (4096, 512))
LABELS = ("loss", "n", "d", "dtype")
# Those that only give a tensor another shape cost a GPU nothing.
VIEWS = frozenset(
    [
        "view",
        "select",
        "slice",
        "unbind",
        "split",
        "expand",
        "permute",
        "transpose",
        "t",
        "numpy_T",
        "alias",
        "detach",
        "as_strided",
        "unsqueeze",
        "squeeze",
        "reshape",
        "_unsafe_view",
    ]
)


class Operators(TorchDispatchMode):
    """Counts what PyTorch runs: how many operators (allocations too, views not) and the bytes of their operands and
    results."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
            if not name.startswith(("empty", "new_empty")):
                given = tree_leaves((arguments, options, result))
                storages = {each.data_ptr(): each.nbytes for each in given if isinstance(each, torch.Tensor)}
                self.bytes += sum(storages.values())
        return result


class Watched:
    """The Triton backend, with something around each of its two operations."""

    def __init__(self, forward: Around, backward: Around) -> None:
        self._around_forward, self._around_backward = forward, backward
        self._backend = TritonBackend()

    def forward(self, problem: Problem, keep: bool = False) -> Statistics:
        with self._around_forward:
            return self._backend.forward(problem, keep)

    def backward(
        self, problem: Problem, known: Statistics, gradient: StatisticsGradient, wanted: Wanted
    ) -> InputGradients:
        with self._around_backward:
            return self._backend.backward(problem, known, gradient, wanted)

    def forward_and_loss(
        self, problem: Problem, forms: LinearForms, shares: tuple[float, float]
    ) -> tuple[Statistics, Tensor] | None:
        with self._around_forward:
            return self._backend.forward_and_loss(problem, forms, shares)

    def reduced(
        self, problem: Problem, known: Statistics, forms: LinearForms, shares: tuple[float, float]
    ) -> Tensor | None:
        with self._around_forward:
            return self._backend.reduced(problem, known, forms, shares)

    def backward_of_reduced(
        self, problem: Problem, known: Statistics, gradient: ReducedGradient, wanted: Wanted
    ) -> InputGradients:
        with self._around_backward:
            return self._backend.backward_of_reduced(problem, known, gradient, wanted)


class Stopwatch:
    """The seconds within, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


Around = AbstractContextManager[Any]


@contextlib.contextmanager
def watched(forward: Around, backward: Around, note: stubbed.Note | None) -> Iterator[None]:
    """Within, the loss runs on a GPU that is none, with something around each operation; launches go to `note`."""
    backend = Watched(forward, backward)
    with stubbed.gpu(note), mock.patch.object(backends, "select", lambda *_: backend):  # noqa: PT008
        yield


def counted(case: Case) -> tuple[Operators, Operators, list[str]]:
    """The operators of a forward and of a backward pass, and the kernels that they launch."""
    launched: list[str] = []
    forward, backward = Operators(), Operators()
    run = forward_backward(case.fused("triton"), *case.operands())
    with watched(forward, backward, lambda launch: launched.append(launch[0])):
        run()
    return forward, backward, launched


def timed(case: Case, rounds: int, calls: int) -> dict[str, Timing]:
    """The seconds of a call: of each operation, of the two, and of the whole loss with autograd around them."""
    run = forward_backward(case.fused("triton"), *case.operands())
    measured: dict[str, list[float]] = {"forward": [], "backward": [], "passes": [], "whole": []}
    forward, backward, loss = stopwatches = Stopwatch(), Stopwatch(), Stopwatch()
    with watched(forward, backward, None):
        for done in range(-1, rounds):  # one to warm up
            for stopwatch in stopwatches:
                stopwatch.seconds = 0.0
            with loss:
                for _ in range(calls):
                    run()
            each = (forward.seconds, backward.seconds, forward.seconds + backward.seconds, loss.seconds)
            for values, seconds in zip(measured.values(), each, strict=True):
                values.extend([seconds / calls] * (done >= 0))
    return {name: Timing.of(values) for name, values in measured.items()}


def measure(case: Case, rounds: int, calls: int) -> Row:
    forward, backward, launched = counted(case)
    return {
        **case.labels(),
        **timed(case, rounds, calls),
        "launches": len(launched),
        "forward operators": len(forward.names),
        "backward operators": len(backward.names),
        "backward MB": backward.bytes / 1e6,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=20, help="of the loss, a round (default: 20)")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.calls) < 1:
        parser.error(f"--rounds {options.rounds} and --calls {options.calls} must be at least 1")
    torch.set_num_threads(1)
    cases = [Case(loss, torch.bfloat16, *size) for size in SIZES for loss in LOSSES]
    rows = [measure(case, options.rounds, options.calls) for case in cases]
    print(table(rows))
    record = Record("host", "cpu", LABELS)
    record.add(rows)
    print(f"written to {record.path}")
