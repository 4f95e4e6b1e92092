"""What a call of the loss costs beside its kernels, counted: PyTorch's operators, and the bytes that they allocate."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import needs_cpu_kernels
from torch.profiler import ProfilerActivity, profile

from softclip_kernels import Hard, Mix, SelfTeacher, partition, softclip_loss
from softclip_kernels.backends import cpu
from softclip_kernels.testing import operands

pytestmark = needs_cpu_kernels

N, D = 300, 64

# Every operator that the profiler sees and that no other one calls, from the call of the loss to the end of its
# backward pass; views, reads of one number and allocations of nothing included.
HARD, PSD = 12, 16


def profiled(target):
    leaves = [leaf.requires_grad_() for leaf in operands(N, N, D, dtype=torch.float32)]

    def step():
        return torch.autograd.grad(softclip_loss(*leaves, target, backend="cpu"), leaves)

    step()  # what a process does once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiler:
        step()
    return profiler.events()


def outermost(events):
    def is_operator(event):
        return event.name.startswith(("aten::", "softclip::"))

    def inside(event):
        parent = event.cpu_parent
        while parent is not None and not is_operator(parent):
            parent = parent.cpu_parent
        return parent is not None

    return [event for event in events if is_operator(event) and not inside(event)]


def soft():
    return Mix(Hard(), SelfTeacher(swap="paired"), partition(N, N // 2, seed=0, step=0).float())


@pytest.mark.parametrize(("make", "most"), ((Hard, HARD), (soft, PSD)), ids=("hard", "psd"))
def test_few_operators_surround_the_kernels(make, most):
    names = [event.name for event in outermost(profiled(make()))]
    assert len(names) <= most, sorted(names)
    assert not {"aten::exp", "aten::expm1", "aten::index_add_", "aten::mul_", "aten::where"} & set(names)


def test_nothing_of_more_than_a_vector_is_allocated_but_gradients_and_kept_logits(monkeypatch):
    """With the hard loss beside its kernels: both gradients, the statistics, and what is kept."""

    def allocated():
        return sum(max(event.self_cpu_memory_usage, 0) for event in profiled(Hard()))

    monkeypatch.setenv(cpu.KEPT_VARIABLE, "0")
    without = allocated()
    assert 2 * N * D * 4 <= without <= 2 * N * D * 4 + 12 * N * 4 + 4096
    monkeypatch.setenv(cpu.KEPT_VARIABLE, "20")
    assert N * N * 4 <= allocated() - without <= 4 * (N + 240) * 2 * 240
