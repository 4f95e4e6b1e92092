"""The loss over ranks under what programs do around a loss: torch.compile, autocast, no gradients, several losses in a
step, another backend, another device."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.backends import needs_cpu_kernels
from helpers.ranks import run_interpreters, shares
from helpers.sharding import PLANS, WIDTH, check, local_target

from softclip_kernels import Dense, Exchange, Hard, softclip_loss, softclip_loss_with_ranks
from softclip_kernels.distributed import agreement, failures, laps
from softclip_kernels.distributed.exchange import Layout
from softclip_kernels.problem import Problem
from softclip_kernels.testing import SQUARE_TARGETS, operands, unit_rows

RANKS = 2  # of the fixture `pool`


def leaves(group, dtype=torch.float64):
    rank = dist.get_rank(group)
    x, y = (unit_rows(6, 8, seed=10 * seed + rank, dtype=dtype).requires_grad_() for seed in (0, 1))
    return x, y, torch.tensor(10.0, dtype=dtype, requires_grad=True)


def compiled_and_eager(group, plan, ranked):
    exchange, operands = Exchange(group, plan), leaves(group, torch.float32)

    def step(x, y, scale):
        x, y = x * 1.5, y * 0.5
        if ranked:
            loss, ranks = softclip_loss_with_ranks(x, y, scale, group=exchange)
            return loss * 2, ranks.rows
        return softclip_loss(x, y, scale, group=exchange) * 2, torch.zeros(0)

    found = []
    for function in (step, torch.compile(step, backend="eager")):
        loss, ranks = function(*operands)
        found.append([loss.detach(), ranks, *torch.autograd.grad(loss, operands)])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("ranked", (False, True))
def test_a_compiled_step_equals_the_eager_one(pool, ranked):
    """Bit for bit, with what stands before and after the loss compiled. (More in test_compiled_ranks.py.)"""
    pool.run(compiled_and_eager, "ring", ranked)


def without_gradients(group, plan):
    x, y, scale = leaves(group)
    exchange = Exchange(group, plan)
    loss = softclip_loss(x, y, scale, group=exchange)
    with torch.no_grad():
        assert torch.equal(softclip_loss(x, y, scale, group=exchange), loss)
    with torch.inference_mode():
        assert torch.equal(softclip_loss(x, y, scale, group=exchange), loss)
    gradients = torch.autograd.grad(loss, (x, y))
    alone = softclip_loss(x, y, scale.detach(), group=exchange)
    assert torch.equal(alone, loss)
    assert all(map(torch.equal, torch.autograd.grad(alone, (x, y)), gradients))
    (only,) = torch.autograd.grad(softclip_loss(x.detach(), y, scale.detach(), group=exchange), (y,))
    assert torch.equal(only, gradients[1])


@pytest.mark.parametrize("plan", PLANS)
def test_without_gradients_of_some_or_all(pool, plan):
    pool.run(without_gradients, plan)


def several_losses(group):
    x, y, scale = leaves(group)
    labels = Hard(torch.randint(12, (6,), generator=torch.Generator().manual_seed(dist.get_rank(group))))
    losses = (
        lambda: softclip_loss(x, y, scale, labels, group=Exchange(group, "ring")),
        lambda: softclip_loss(y, x, scale, group=group),
        lambda: softclip_loss(x, y, scale, labels, group=Exchange(group, "gather")),
    )
    together = torch.autograd.grad(sum(loss() for loss in losses), (x, y, scale))
    apart = [torch.autograd.grad(loss(), (x, y, scale)) for loss in losses]
    for total, *parts in zip(together, *apart, strict=True):
        torch.testing.assert_close(total, sum(parts), rtol=0, atol=1e-12)


def test_several_losses_in_one_step(pool):
    """Their backward laps follow one another, in one order on every rank."""
    pool.run(several_losses)


def under_autocast(group, plan, name):
    x, y, scale = leaves(group, torch.float32)
    target = {
        "dense": Dense(unit_rows(6, 12, seed=dist.get_rank(group)).abs().float()),
        "smoothing": Hard(smoothing=0.1),
    }[name]
    found = []
    for forward, backward in ((False, False), (True, False), (True, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            loss = softclip_loss(x, y, scale, target, group=Exchange(group, plan))
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            found.append((loss.detach(), *torch.autograd.grad(loss, (x, y, scale))))
    for usual, *others in zip(*found, strict=True):
        assert all(torch.equal(usual, other) for other in others)


@pytest.mark.parametrize("name", ("dense", "smoothing"))
@pytest.mark.parametrize("plan", PLANS)
def test_autocast_changes_nothing(pool, plan, name):
    pool.run(under_autocast, plan, name)


@needs_cpu_kernels
@pytest.mark.parametrize("plan", PLANS)
def test_cpu_kernels(pool, plan):
    names = ("hard", "psd", "psd_block", "psd_external", "labels")
    check(pool, names, (33, 32), (33, 32), plan, torch.float32, "cpu")
    check(pool, names, (0, 50), (0, 50), plan, torch.float32, "cpu")


TRITON = """
import torch
from helpers.sharding import WIDTH, assembled, compute
from softclip_kernels.testing import ALL_TARGETS, assert_as_accurate_as_dense, operands
torch.set_num_threads(1)
counts = (20, 13)
for plan in ("gather", "ring"):
    own = compute(dist.group.WORLD, ("psd",), (counts, counts), plan, torch.float32, "triton")
    found = [None, None]
    dist.all_gather_object(found, own)
    result = assembled(found, "psd", torch.float32)
    assert_as_accurate_as_dense(result, *operands(33, 33, WIDTH, dtype=torch.float32), ALL_TARGETS["psd"](33, 33))
print("as accurate as dense")
"""


def test_interpreted_triton_kernels():
    """In processes of their own, because one either interprets the kernels or compiles them."""
    pytest.importorskip("triton")
    for output in run_interpreters(TRITON, 2, TRITON_INTERPRET="1"):
        assert output.endswith("as accurate as dense\n")


# --- other devices, as far as a machine without one shows them --------------------------------------------------------


class Group:
    """Of a GPU's backend alone, or with one for the CPU."""

    def __init__(self, *kinds, bound=None):
        self._device_types = [torch.device(kind) for kind in kinds]
        self.bound_device_id = bound


def test_integers_travel_where_the_embeddings_are():
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    both, bound, unbound = Group("cuda", "cpu"), Group("cuda", bound=second), Group("cuda")
    assert agreement._control_device(Exchange(both)) == torch.device("cpu")
    assert agreement._control_device(Exchange(bound)) == second
    with mock.patch.object(torch.cuda, "current_device", return_value=0):
        assert agreement._control_device(Exchange(unbound)) == first
        for device, group in ((first, unbound), (second, bound), (first, both), (second, both)):
            agreement._check_device(device, Exchange(group))
        for device, group in ((second, unbound), (first, bound)):
            with pytest.raises(
                ValueError, match=r"x is on .*, but the group exchanges on cuda:\d; call torch.cuda.set"
            ):
                agreement._check_device(device, Exchange(group))
        with pytest.raises(ValueError, match="x is on cpu; allowed: a device that the group exchanges on, cuda"):
            agreement._check_device(torch.device("cpu"), Exchange(unbound))


def first_exchanges(group, plan, counts):
    """How many exchanges there are between the agreement and the first lap, where the integers travel elsewhere."""
    x = unit_rows(counts[dist.get_rank(group)], 4)
    layout = Layout(
        sum(counts), sum(counts), len(x), len(x), 0, 0, x.dtype, x.device, Exchange(group, plan), counts, counts
    )
    with (
        mock.patch.object(agreement, "_control_device", return_value=torch.device("meta")),
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
    ):
        decided = agreement.decide_plan(Problem(x, x, torch.ones(())), layout)
    assert decided.exchange.plan == plan
    return reduce.call_count


def test_a_ring_with_empty_ranks_begins_with_an_exchange_of_all(pool):
    """Which makes a device's connections; a ring's own first step may be without some ranks."""
    for plan, counts, expected in (("ring", (0, 3), 1), ("ring", (2, 3), 0), ("gather", (0, 3), 0)):
        assert pool.run(first_exchanges, plan, counts) == [expected] * 2


class Work:
    def __init__(self):
        self.limits = []

    def wait(self, *limit):
        self.limits.append(limit)


def test_only_the_last_wait_of_a_lap_has_a_time_out_off_the_cpu(pool):
    """A wait with a time-out holds the host until the device is done."""
    group, work = Group("cuda"), Work()
    group._get_backend = lambda device: mock.Mock(**{"name.return_value": "gloo" if device.type == "cpu" else "nccl"})
    exchange = Exchange(group, timeout=3.0)
    for device, last in (("cuda", False), ("cuda", True), ("cpu", False), ("cpu", True)):
        failures.wait(work, exchange, torch.device(device), last)
    limit = (exchange.wait_limit,)
    assert work.limits == [(), limit, limit, limit]


def waits(group, plan, name):
    """Which waits of a loss and its backward pass are the last of a lap."""
    seen = []

    def seeing(work, exchange, device, last=False):
        seen.append(last)
        work.wait()

    own = shares((5, 6))[dist.get_rank(group)]
    x, y, scale = operands(11, 11, WIDTH, dtype=torch.float64)
    x, y = x[own].clone().requires_grad_(), y[own].clone().requires_grad_()
    with mock.patch.object(laps, "wait", seeing):
        target = local_target(SQUARE_TARGETS[name](11, 11), own, own)
        softclip_loss(x, y, scale, target, group=Exchange(group, plan)).backward()
    return seen


@pytest.mark.parametrize("plan", PLANS)
def test_every_lap_has_a_last_wait(pool, plan):
    for seen in pool.run(waits, plan, "psd"):
        assert seen[-1] and 2 <= sum(seen) < len(seen)
