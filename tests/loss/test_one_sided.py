"""A frozen operand (LiT's tower, a detached side) costs no matrix product, and changes no other gradient. Triton's
kernels: test_triton.py; speed: `python -m bench cpu`."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.backends import needs_cpu_kernels
from helpers.products import Products, bytes_sent
from helpers.ranks import shares

from softclip_kernels import Exchange, Hard, Mix, SelfTeacher, Teacher, ops, softclip_loss
from softclip_kernels.backends import cpu
from softclip_kernels.testing import ALL_TARGETS, operands, unit_rows

N, D = 96, 16
# Which of x, y and scale learn.
LEARNING = {
    "all": (True, True, True),
    "x frozen": (False, True, True),
    "y frozen": (True, False, True),
    "x and scale frozen": (False, True, False),
    "y and scale frozen": (True, False, False),
    "scale alone": (False, False, True),
}
# Products of 2 N² D in a backward pass: the logits again, G @ y and Gᵀ @ x; the scale's gradient needs one of them.
PRODUCTS = {name: 1 + max(1, sum(learns[:2])) for name, learns in LEARNING.items()}


def gradients(learns, target, backend, dtype=torch.float64, group=None):
    """dx, dy and dscale, None where the operand is frozen."""
    leaves = [leaf.requires_grad_(each) for leaf, each in zip(operands(N, N, D, dtype=dtype), learns, strict=True)]
    softclip_loss(*leaves, target, backend=backend, group=group).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", ALL_TARGETS)
def test_the_other_gradients_stay_the_same(name, backend):
    """Bit for bit; the scale's, which then comes from the other product, up to rounding."""
    target, dtype = ALL_TARGETS[name](N, N), torch.float32 if backend == "cpu" else torch.float64
    full = gradients(LEARNING["all"], target, backend, dtype)
    for case, learns in LEARNING.items():
        for got, expected, learning in zip(gradients(learns, target, backend, dtype), full, learns, strict=True):
            assert (got is not None) == learning, case
            if got is None:
                continue
            if got.dim():
                assert torch.equal(got, expected), case
            else:
                torch.testing.assert_close(got, expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0.0)


@pytest.fixture
def transparent_backward(monkeypatch):
    """The operator as a plain function, so that products inside of it are counted."""
    monkeypatch.setattr(ops, "backward", ops.run_backward)


def backward_products(learns, target, backend):
    """The backward pass's matrix products, in units of 2 N² D."""
    leaves = [leaf.requires_grad_(each) for leaf, each in zip(operands(N, N, D), learns, strict=True)]
    loss = softclip_loss(*leaves, target, backend=backend)
    with Products() as counter:
        loss.backward()
    return counter.operations / (2 * N * N * D)


@pytest.mark.parametrize("case", LEARNING)
@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_a_frozen_operand_costs_no_product(case, backend, transparent_backward):
    learns, own = LEARNING[case], Teacher(unit_rows(N, D, seed=2).float(), unit_rows(N, D, seed=3).float(), 9.0)
    assert backward_products(learns, Hard(), backend) == PRODUCTS[case]
    assert backward_products(learns, Mix(Hard(), SelfTeacher(swap="paired"), 0.5), backend) == PRODUCTS[case]
    assert backward_products(learns, Mix(Hard(), own, 0.5), backend) == PRODUCTS[case] + 1  # the teacher's logits


@needs_cpu_kernels
@pytest.mark.parametrize("case", LEARNING)
def test_the_cpu_kernels_are_asked_for_no_more_than_is_needed(case):
    """What C++ gets no tensor for, it does not compute (test_cpu.py)."""
    learns = LEARNING[case]
    with mock.patch.object(cpu._cpu, "backward", wraps=cpu._cpu.backward) as backward:
        gradients(learns, Hard(), "cpu", torch.float32)
    asked = backward.call_args.kwargs
    assert tuple(asked[name] is not None for name in ("dx", "dy", "dscale")) == learns


RANKS = 2  # of the fixture `pool`


def share_of_gradients(group, plan, name, learns_of_rank):
    """This rank's gradients, the products of its backward pass, and the bytes that it sends in it."""
    rank = dist.get_rank(group)
    own = shares((N // 2, N // 2))[rank]
    x, y, scale = operands(N, N, D, dtype=torch.float64)
    leaves = [
        leaf.requires_grad_(each) for leaf, each in zip((x[own], y[own], scale), learns_of_rank[rank], strict=True)
    ]
    target = ALL_TARGETS[name](N, N)
    loss = softclip_loss(*leaves, target, group=Exchange(group, plan), backend="reference")
    with bytes_sent() as sent, Products() as counter:
        loss.backward()
    products = counter.operations / (2 * (N // 2) * N * D)
    return [None if leaf.grad is None else leaf.grad.numpy() for leaf in leaves], products, sum(sent)


@pytest.mark.parametrize("plan", ("gather", "ring"))
@pytest.mark.parametrize("name", ("hard", "smoothing"))
def test_over_ranks(pool, plan, name):
    """Ranks that all freeze y make one product less and send no gradient back; one that freezes it alone still
    contributes to the others'."""
    everyone = [LEARNING["all"]] * 2
    full = pool.run(share_of_gradients, plan, name, everyone)
    frozen = pool.run(share_of_gradients, plan, name, [LEARNING["y frozen"]] * 2)
    x_frozen = pool.run(share_of_gradients, plan, name, [LEARNING["x frozen"]] * 2)
    alone = pool.run(share_of_gradients, plan, name, [LEARNING["y frozen"], LEARNING["all"]])
    for rank in range(2):
        (dx, dy, dscale), products, sent = full[rank]
        for results, learns in ((frozen, (1, 0)), (x_frozen, (0, 1)), (alone, (1, int(rank == 1)))):
            got = results[rank][0]
            assert [gradient is not None for gradient in got] == [*map(bool, learns), True]
            for one, expected in zip(got[:2], (dx, dy), strict=True):
                assert one is None or (one == expected).all()
            assert got[2] == pytest.approx(dscale, rel=1e-9)
        assert frozen[rank][1] == products - 1 and x_frozen[rank][1] == products - 1
        assert alone[rank][1] == products
        if plan == "ring":
            assert sent - frozen[rank][2] >= (N // 2) * D * 8  # the columns' gradient, at least one hop
