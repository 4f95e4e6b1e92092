"""What the Triton backend leaves to PyTorch, in the two operators at the size of the goals: how many operators, the
bytes that they touch, and what is allocated beyond operands and results. Launches are stubbed (bench/stubbed.py)."""

from __future__ import annotations

import itertools
import types
from dataclasses import replace

import pytest
import torch
from helpers.allocations import Allocations
from helpers.backends import needs_triton

from softclip_kernels import backends
from softclip_kernels.problem import Problem, Source, TeacherOperand
from softclip_kernels.stats import StatisticsGradient, Wanted

pytestmark = needs_triton

N, D = 32768, 512
MIB = 2**20


@pytest.mark.parametrize("loss", ("hard", "psd", "psd_teacher"))
def test_few_operators_and_little_traffic_beside_the_kernels(loss):
    """Allocations counted, views not: each takes the host longer than a small kernel takes a GPU."""
    from bench import host
    from bench.problems import Case

    forward, backward, launched = host.counted(Case(loss, torch.bfloat16, N, D))
    assert {"softmax_forward_kernel", "softmax_backward_kernel", "products_kernel"} <= set(launched)
    assert len(forward.names) <= 20, forward.names
    assert len(backward.names) <= 30, backward.names
    assert backward.bytes <= 0.4e9


def test_the_hosts_time_is_told_by_operation(monkeypatch):
    """By a clock that ticks whenever it is read."""
    from bench import host
    from bench.problems import Case

    ticks = itertools.count()
    monkeypatch.setattr(host, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = host.timed(Case("psd", torch.bfloat16, 64, 64), rounds=3, calls=2)
    seconds = {name: timing.seconds for name, timing in found.items()}
    # Each operation reads it twice, the whole once before and once after two calls of both.
    assert seconds == {"forward": (1,) * 3, "backward": (1,) * 3, "passes": (2,) * 3, "whole": (9 / 2,) * 3}


def meta_problem(n, source):
    """In bfloat16 on the meta device, whose tensors have no memory."""
    x, y, a, b = (torch.empty(n, D, dtype=torch.bfloat16, device="meta") for _ in range(4))
    scale, index = torch.empty((), device="meta"), torch.empty(n, dtype=torch.int64, device="meta")
    own = (scale, a, b) if source == Source.EMBEDDINGS else (None, None, None)
    teachers = () if source is None else (TeacherOperand(source, *own),)
    return Problem(x, y, scale, index, teachers=teachers, positive_row=index)


# Mirrored super-blocks come back to a range of rows, whose sums are kept meanwhile.
@pytest.mark.parametrize(
    ("limit", "n", "source", "allowed"),
    (
        ("64", N, None, 64 * MIB),
        ("64", N, Source.EMBEDDINGS, 64 * MIB),
        ("64", N, Source.TRANSPOSED, 96 * MIB),
        ("64", N // 2, Source.TRANSPOSED, 64 * MIB),
        ("", N, None, 384 * MIB),
        ("", N, Source.TRANSPOSED, 384 * MIB),
    ),
)
@pytest.mark.parametrize("labels", (False, True))
def test_memory_beyond_operands_and_gradients(monkeypatch, limit, n, source, allowed, labels):
    """Within SOFTCLIP_GPU_MIB, and 64 bytes a row for vectors: statistics and coefficients."""
    from bench import stubbed

    monkeypatch.setenv("SOFTCLIP_GPU_MIB", limit)

    problem, triton = meta_problem(n, source), backends.registered()["triton"]
    if labels:  # several rows may share a column, whose positives are scattered
        problem = replace(problem, positive_row=None)
    rows, columns = (torch.empty(1 + len(problem.teachers), n, device="meta") for _ in range(2))
    gradient = StatisticsGradient(rows, columns, torch.empty(n, device="meta"))
    operands = [each for each in (*problem.tensors(), *gradient) if each is not None]
    with stubbed.gpu(lambda launch: None), Allocations(*operands) as allocations:
        statistics = triton.forward(problem)
        gradients = triton.backward(problem, statistics, gradient, Wanted(rounded=True))
    assert gradients.x.dtype == gradients.y.dtype == torch.bfloat16
    beyond = allocations.most - gradients.x.nbytes - gradients.y.nbytes
    assert 32 * MIB < beyond <= allowed + 64 * n
