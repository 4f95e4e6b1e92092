"""Logits of small problems, which the CPU backend keeps from the forward to the backward pass: the same bits as
computed again, and no more of them than is stated."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import needs_cpu_kernels

from softclip_kernels import softclip_loss
from softclip_kernels.backends import cpu, registered
from softclip_kernels.problem import Problem, Source, TeacherOperand
from softclip_kernels.stats import StatisticsGradient, Wanted
from softclip_kernels.testing import ALL_TARGETS, Result, operands, unit_rows

pytestmark = needs_cpu_kernels

CPU = registered()["cpu"]
MIB = 2**20
MEMORY_TO_KEEP = cpu._memory_to_keep
MIRRORED = (TeacherOperand(Source.TRANSPOSED),)


def of_nan(*arguments):
    kept = MEMORY_TO_KEEP(*arguments)
    return None if kept is None else kept.fill_(float("nan"))


def results(name, n, dtype, mib, monkeypatch):
    """Loss and gradients with this limit, twice from one graph. What is kept lies where NaN lay."""
    monkeypatch.setenv(cpu.KEPT_VARIABLE, str(mib))
    monkeypatch.setattr(cpu, "_memory_to_keep", of_nan)
    leaves = [leaf.requires_grad_() for leaf in operands(n, n, 40, dtype=dtype)]
    loss = softclip_loss(*leaves, ALL_TARGETS[name](n, n), backend="cpu")
    return [Result(loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)) for _ in range(2)]


# No teacher; a mirror that shares the student's exponentials and one that does not; own embeddings; biases; segments.
@pytest.mark.parametrize("name", ("hard", "psd", "psd_own_scale", "psd_external", "self_sinkhorn", "psd_block"))
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_kept_logits_change_no_bit(level, name, dtype, threads, monkeypatch):
    for count in (1, 3):
        threads(count)
        for n in (2, 33, 300, 500):  # 500: several blocks and, of three threads, ragged jobs
            again, repeated = results(name, n, dtype, 20, monkeypatch)
            computed, _ = results(name, n, dtype, 0, monkeypatch)
            assert not again.differing(computed) and not repeated.differing(computed)


def kept_by(n, m=None, teachers=()):
    x, y = unit_rows(n, 8, dtype=torch.float32), unit_rows(m or n, 8, seed=1, dtype=torch.float32)
    return CPU.forward(Problem(x, y, torch.tensor(9.0), teachers=teachers), keep=True).kept


@pytest.mark.parametrize("count", (1, 2))
def test_what_is_kept_is_hardly_more_than_the_logits(level, count):
    """Blocks are as narrow as their columns. A mirror has the logits of the other half of the pairs; only the blocks
    on the diagonal lie there twice."""
    for n, m, teachers in ((2048, 2048, MIRRORED), (2048, 2048, ()), (1000, 700, ()), (700, 1000, ())):
        x, y = unit_rows(n, 8, dtype=torch.float32), unit_rows(m, 8, seed=1, dtype=torch.float32)
        kept = cpu._cpu.kept_floats(
            cpu._bound(Problem(x, y, torch.tensor(9.0), teachers=teachers)), level, (count, count)
        )
        assert n * m <= kept <= 1.15 * n * m


def test_they_are_kept_up_to_the_limit(threads, monkeypatch):
    """Nothing at all is kept beyond the limit."""
    threads(1)
    for mib in (1, 3):
        monkeypatch.setenv(cpu.KEPT_VARIABLE, str(mib))
        for n in (100, 200, 400, 500, 700, 900, 1100):
            kept = kept_by(n)
            assert kept is None or kept.nbytes <= mib * MIB
            assert kept is not None or 1.1 * 4 * n**2 > mib * MIB
    monkeypatch.setenv(cpu.KEPT_VARIABLE, "0")
    assert kept_by(5) is None


def test_a_wrong_limit_is_refused(monkeypatch):
    for wrong in ("-1", "many", "1.5", ""):
        monkeypatch.setenv(cpu.KEPT_VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"{cpu.KEPT_VARIABLE}='{wrong}' must be a whole number of MiB; 0 keeps"):
            softclip_loss(*(leaf.requires_grad_() for leaf in operands(4, 4, 8, dtype=torch.float32)), backend="cpu")


@pytest.mark.parametrize("wants", (True, False))
def test_an_evaluation_keeps_nothing(wants, monkeypatch):
    asked = []
    forward = cpu.CpuBackend.forward
    monkeypatch.setattr(
        cpu.CpuBackend, "forward", lambda self, problem, keep=False: asked.append(keep) or forward(self, problem, keep)
    )
    leaves = operands(9, 9, 8, dtype=torch.float32)
    softclip_loss(*(leaf.requires_grad_(wants) for leaf in leaves), backend="cpu")
    with torch.no_grad():
        softclip_loss(*leaves, backend="cpu")
    assert asked == [wants, False]


def gradients(problem, statistics):
    ones = StatisticsGradient(torch.ones(1, problem.rows), torch.ones(1, problem.columns), torch.zeros(problem.rows))
    return CPU.backward(problem, statistics, ones, Wanted())


def test_a_backward_takes_what_was_kept(level, threads, monkeypatch):
    """It reads the kept logits, divides the work as the forward did, and computes them again where the blocks were of
    another size."""
    threads(3)
    x, y = unit_rows(500, 24, dtype=torch.float32), unit_rows(500, 24, seed=1, dtype=torch.float32)
    problem = Problem(x, y, torch.tensor(9.0), torch.arange(500))
    statistics = CPU.forward(problem, keep=True)
    expected = gradients(problem, statistics)
    threads(1)
    for one, other in zip(gradients(problem, statistics), expected, strict=True):
        assert torch.equal(one, other)
    twice = statistics._replace(kept=statistics.kept.clone())
    twice.kept[16:] *= 2  # but for the header
    assert not torch.equal(gradients(problem, twice).x, expected.x)
    again = gradients(problem, statistics._replace(kept=None))
    for field in (1, 2, 3):  # of the header: a block's and a register tile's sizes
        other = twice._replace(kept=twice.kept.clone())
        other.kept.view(torch.int32)[field] += 1
        for one, computed in zip(gradients(problem, other), again, strict=True):
            assert torch.equal(one, computed)
    sizes = {"avx2": "portable", "portable": "avx2"}  # blocks of 240 and of 224
    if sizes.get(level, "avx2") in cpu.levels():
        monkeypatch.setenv(cpu.ISA_VARIABLE, sizes.get(level, "avx2"))
        for one, other in zip(gradients(problem, twice), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_more_is_written_than_was_asked_for(level, threads):
    for count in (1, 2):
        threads(count)
        for n in (1, 33, 241, 460):
            for teachers in ((), MIRRORED):
                x = unit_rows(n, 8, dtype=torch.float32)
                problem = Problem(x, x, torch.tensor(9.0), teachers=teachers)
                bound, threads_in_use = cpu._bound(problem), cpu._threads(problem)
                needed = cpu._cpu.kept_floats(bound, level, threads_in_use)
                fenced = torch.full((needed + 4096,), 77.0)
                statistics = CPU.forward(problem)
                cpu._cpu.forward(
                    bound,
                    level,
                    threads_in_use,
                    rows=statistics.rows.packed,
                    columns=statistics.columns.packed,
                    positive_logit=None,
                    row_ranks=None,
                    column_ranks=None,
                    kept=fenced,
                )
                assert (fenced[needed:] == 77).all() and not (fenced[:needed] == 77).all()
