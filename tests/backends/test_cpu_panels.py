"""Operands that the CPU kernels pack once for all threads, where that is little memory: the same bits as where every
thread packs what it meets, and no work done twice."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import needs_cpu_kernels

from softclip_kernels.backends import cpu, registered
from softclip_kernels.problem import Problem, Source, TeacherOperand
from softclip_kernels.stats import StatisticsGradient, Wanted
from softclip_kernels.testing import unit_rows

pytestmark = needs_cpu_kernels

CPU = registered()["cpu"]
SHARED = 9 * 2**20  # kSharedBytes of csrc/cpu/panels.cpp
MIRRORED = TeacherOperand(Source.TRANSPOSED)


def problem(n, m, d, dtype, *teachers):
    x, y = unit_rows(n, d, dtype=dtype), unit_rows(m, d, seed=1, dtype=dtype)
    return Problem(x, y, torch.tensor(14.3), positive_column=torch.arange(n) % m, teachers=teachers)


def of_no_weight(n, m, dtype, level, sides):
    """A teacher whose own panels alone are more than what is shared. All of its logits are 0."""
    element = 2 if (dtype, level) == (torch.bfloat16, "avx512bf16") else 4
    width = SHARED // (sides * element * (n + m)) + 2
    return TeacherOperand(
        Source.EMBEDDINGS, torch.tensor(1.0), *(torch.zeros(each, width, dtype=dtype) for each in (n, m))
    )


def student(problem, k, keep, wanted):
    """Its statistics, those of the first k teachers, and gradients that only they have a part in."""
    statistics, teachers = CPU.forward(problem, keep=keep), len(problem.teachers)
    rows, columns = (statistics.rows.packed, statistics.columns.packed)
    of_rows, of_columns = (torch.zeros(1 + teachers, each.shape[1]) for each in (rows, columns))
    for seed, gradient in ((5, of_rows), (6, of_columns)):
        gradient[: 1 + k] = unit_rows(1 + k, gradient.shape[1], seed=seed)
    gradients = CPU.backward(
        problem, statistics, StatisticsGradient(of_rows, of_columns, torch.ones(len(of_rows[0]))), wanted
    )
    found = [rows[: 1 + 2 * k], columns[: 1 + 2 * k], statistics.positive_logit, *gradients]
    return [each for each in found if each is not None]


@pytest.mark.parametrize("keep", (False, True))
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize(
    "shape",
    ((15, 33, 5), (245, 500, 40), (500, 245, 33), (2, 2, 3), (245, 245, 33), (500, 500, 40)),
)
def test_shared_panels_change_no_bit(level, shape, dtype, keep, threads):
    """Groups of rows that are no whole tiles or blocks, or an odd number of them; squares with mirrors."""
    n, m, d = shape
    teachers = (MIRRORED,) if n == m else ()
    wide = of_no_weight(n, m, dtype, level, 1 + len(teachers))
    for count, wanted in ((1, Wanted()), (2, Wanted(x=False)), (3, Wanted()), (3, Wanted(y=False)), (5, Wanted())):
        threads(count)
        shared = student(problem(n, m, d, dtype, *teachers), len(teachers), keep, wanted)
        own = student(problem(n, m, d, dtype, *teachers, wide), len(teachers), keep, wanted)
        assert len(shared) == len(own) and all(map(torch.equal, shared, own))


def test_all_shares_together_pack_as_much_as_one(threads, monkeypatch):
    """In a tournament of 16 groups each share would pack rows and columns 15 times. All are one thread's, so that none
    is kept from a core; the least of many calls."""
    given = problem(512, 512, 512, torch.float32, MIRRORED)
    monkeypatch.setenv(cpu.THREADS_VARIABLE, "own")

    def packing(shares):
        threads(shares)
        monkeypatch.setattr(cpu, "MULTIPLY_ADDS_PER_THREAD", {"shared": 1, "own": float("inf")})
        parts, used = cpu.parts(lambda: CPU.forward(given))
        assert used == 1
        return parts["packing"]

    packing(8)  # memory is there
    eight, one = zip(*((packing(8), packing(1)) for _ in range(20)), strict=True)
    assert min(eight) < 2 * min(one)
