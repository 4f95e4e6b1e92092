"""What the loss costs the host on a GPU: forward and backward of the Triton backend, every launch stubbed.

python -m bench host               time and PyTorch's operators, a line for each loss and size

On the CPU's tensors, whose vectors PyTorch really computes on, so small sizes tell most. The driver's own time for a
launch comes on top of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softclip_kernels import backends
from softclip_kernels.backends.triton import TritonBackend
from softclip_kernels.problem import Problem
from softclip_kernels.stats import InputGradients, Statistics, StatisticsGradient, Wanted

from . import Row, stubbed
from .problems import LOSSES, Case
from .records import Record, table
from .timing import forward_backward, interleaved

SIZES = ((1024, 512), (4096, 512))
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


class Counted:
    """The Triton backend; counts each of its operations."""

    def __init__(self) -> None:
        self.forward_operators, self.backward_operators = Operators(), Operators()
        self._backend = TritonBackend()

    def forward(self, problem: Problem) -> Statistics:
        with self.forward_operators:
            return self._backend.forward(problem)

    def backward(
        self, problem: Problem, known: Statistics, gradient: StatisticsGradient, wanted: Wanted
    ) -> InputGradients:
        with self.backward_operators:
            return self._backend.backward(problem, known, gradient, wanted)


def counted(case: Case) -> tuple[Counted, list[str]]:
    """The operators of a forward and a backward pass, and the kernels that they launch."""
    launched: list[str] = []
    wrapped = Counted()
    run = forward_backward(case.fused("triton"), *case.operands())
    with stubbed.gpu(lambda launch: launched.append(launch[0])), mock.patch.object(backends, "select") as select:
        select.return_value = wrapped
        run()
    return wrapped, launched


def measure(case: Case, rounds: int, calls: int) -> Row:
    counts, launched = counted(case)
    run = forward_backward(case.fused("triton"), *case.operands())
    with stubbed.gpu(lambda launch: None):
        run()
        timing = interleaved({"run": lambda: [run() for _ in range(calls)]}, rounds)["run"]
    return {
        **case.labels(),
        "host ms": 1e3 * timing.median / calls,
        "low ms": 1e3 * timing.low / calls,
        "high ms": 1e3 * timing.high / calls,
        "launches": len(launched),
        "forward operators": len(counts.forward_operators.names),
        "backward operators": len(counts.backward_operators.names),
        "backward MB": counts.backward_operators.bytes / 1e6,
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
