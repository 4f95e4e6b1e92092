"""The Triton backend: GPUs, and the CPU through Triton's interpreter.

operations        the block operations as passes that may be replayed
softmax_forward   the forward block operation: one pass over tiles, one exponential an entry for rows and columns
sums              from its partial sums to the statistics
online            the online softmax, for rows (columns) whose centered sums left the range of fp32
softmax_backward  the backward one: a block of G with its epilogue fused, for two matrix products
softmax_exchange  another way to a transposed teacher's blocks of G: one product in a program
softmax_gradient  a tile of G from its logits, for both
persistent        programs that stay for many tiles: softmax_forward_persistent, softmax_backward_persistent
products          the matrix products with a block of G, in one launch
gradients         from their sums to the gradients: positives, scale, rounding
edges             how large a super-block of G is
coefficients      what the backward pass multiplies exponentials with
positive_entries  the gradient at every row's positive, in full precision
norms, scalars    how large logits may be; a launch's numbers that only the device knows
tiles             what the kernels share: tile order, the streamed matrix product, masks, the places of arguments
passes            from a problem to the kernels' arguments, one pass for each teacher
reduced_loss      the loss from its statistics; linear_forms: what it takes
adjoint           the statistics' gradient from the loss's
total             the sum of a vector
call              a launch of a kernel that costs the host little
replay            a pass that was recorded, launched again with other pointers; recorder, recording
launch            what the launches of a problem share: super-blocks, precision, sums of products
shapes            candidate tile shapes by architecture and problem
tuning            which candidate a GPU runs: timed once, remembered in a file

Importing this package imports neither triton nor any of these modules: they wait for the first problem that they can
compute.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...linear_form import LinearForms, ReducedGradient
from ...problem import Problem
from ...stats import InputGradients, Statistics, StatisticsGradient, Wanted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_RANKED = 2**24  # ranks are counted in fp32
MOST_ROWS = 2**31 - 256  # positions, of whole tiles, are int32


class TritonBackend:
    name = "triton"
    device: str | None = "cuda"

    def why_not(self, problem: Problem) -> str | None:
        x = problem.x
        if not _installed():
            return "triton is not installed; install softclip-kernels[triton]"
        if not x.is_cuda and not (x.device.type == "cpu" and _interpreted()):
            return f"the embeddings are on {x.device}, not on a GPU (TRITON_INTERPRET=1 runs the kernels on the CPU)"
        for name, tensor in (("embeddings", x), *(("teacher's embeddings", t.x) for t in problem.teachers)):
            if tensor is None:
                continue
            if tensor.dtype not in DTYPES:
                return f"the {name} are {tensor.dtype}; the kernels take float32, bfloat16 and float16: cast them"
            if _interpreted() and tensor.dtype != torch.float32:
                return f"the {name} are {tensor.dtype}; Triton's interpreter multiplies float32 only correctly"
        if max(problem.rows, problem.columns) > MOST_ROWS:
            return f"a batch of {max(problem.rows, problem.columns)}; the kernels count up to {MOST_ROWS}"
        if problem.row_threshold is not None and max(problem.rows, problem.columns) >= MOST_RANKED:
            return f"ranks of a batch of {max(problem.rows, problem.columns)}; they are counted up to {MOST_RANKED}"
        return None

    def details(self) -> dict[str, str]:
        if not _installed():
            return {"triton": "not installed"}
        return {"triton": importlib.metadata.version("triton")} | ({"interpreter": "on"} if _interpreted() else {})

    def forward(self, problem: Problem, keep: bool = False) -> Statistics:
        with _on(problem.x.device):
            return _operations().forward(problem)

    def forward_and_loss(
        self, problem: Problem, forms: LinearForms, shares: tuple[float, float]
    ) -> tuple[Statistics, Tensor] | None:
        with _on(problem.x.device):
            return _operations().forward_and_loss(problem, forms, shares)

    def reduced(
        self, problem: Problem, statistics: Statistics, forms: LinearForms, shares: tuple[float, float]
    ) -> Tensor | None:
        with _on(problem.x.device):
            return _operations().reduced(problem, statistics, forms, shares)

    def backward(
        self,
        problem: Problem,
        statistics: Statistics,
        gradient: StatisticsGradient,
        wanted: Wanted,
    ) -> InputGradients:
        with _on(problem.x.device):
            return _operations().backward(problem, statistics, gradient, wanted)

    def backward_of_reduced(
        self, problem: Problem, statistics: Statistics, gradient: ReducedGradient, wanted: Wanted
    ) -> InputGradients:
        with _on(problem.x.device):
            return _operations().backward_of_reduced(problem, statistics, gradient, wanted)


@cache
def _operations() -> Any:
    from . import operations

    return operations


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(device)


_NOWHERE: AbstractContextManager[object] = contextlib.nullcontext()
