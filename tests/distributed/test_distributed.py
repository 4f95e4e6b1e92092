"""The loss over ranks equals the loss of one process: value and every gradient, for every target, plan and sharding."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.ranks import shares
from helpers.sharding import PLANS, WIDTH, assembled, check, compute, over_ranks

from softclip_kernels import (
    Exchange,
    Hard,
    ProgressiveSelfDistillation,
    SelfTeacher,
    schedules,
    softclip_loss,
    softclip_loss_with_ranks,
)
from softclip_kernels.testing import (
    ALL_TARGETS,
    RECTANGULAR_TARGETS,
    SQUARE_TARGETS,
    Result,
    Standard,
    dense_row_losses,
    dense_target,
    matching_rows,
    operands,
    truth,
    unit_rows,
)

RANKS = 4  # of the fixture `pool`


# Even and uneven shards, one of a single row, empty ones at the ring's start, middle and end; the block edge is 48.
SQUARE_SHARDS = (
    (65,),
    (33, 32),
    (1, 64),
    (0, 50),
    (20, 25, 20),
    (40, 0, 9),
    (17, 16, 16, 16),
    (0, 60, 1, 4),
    (5, 70, 3, 0),
)
# Rows and columns shared out differently: more rows than columns and the other way round, ranks without one of the two.
RECTANGULAR_SHARDS = (
    ((30,), (50,)),
    ((33, 32), (20, 25)),
    ((0, 40), (31, 0)),
    ((7, 20, 30), (40, 0, 21)),
    ((16, 0, 17, 9), (3, 60, 0, 12)),
)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("counts", SQUARE_SHARDS, ids=str)
def test_square_targets(pool, counts, plan):
    check(pool, tuple(SQUARE_TARGETS), counts, counts, plan, torch.float64)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("counts", RECTANGULAR_SHARDS, ids=str)
def test_rectangular_targets(pool, counts, plan):
    check(pool, tuple(RECTANGULAR_TARGETS), *counts, plan, torch.float64)


FLOAT32_SHARDS = ((65,), (33, 32), (0, 50), (20, 25, 20), (20, 1, 40, 30))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("counts", FLOAT32_SHARDS, ids=str)
def test_float32(pool, counts, plan):
    """The precision that most will train with, on every number of ranks."""
    check(pool, ("hard", "psd", "psd_block", "psd_external", "labels"), counts, counts, plan, torch.float32)


# Sums over ranks are where a low precision would be lost: uneven shards on the most ranks, each kind of exchange.
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_low_precision(pool, plan, dtype):
    names = ("hard", "smoothing", "psd", "psd_several_block", "labels", "groups", "two_indices", "teacher_sinkhorn")
    check(pool, names, (20, 1, 40, 30), (20, 1, 40, 30), plan, dtype)


def unaligned_hard(group, plan):
    rank = dist.get_rank(group)
    rows, columns = shares((10, 30, 20))[rank], shares((25, 5, 30))[rank]
    x, y, scale = operands(60, 60, WIDTH, dtype=torch.float64)
    result, exact = over_ranks(x[rows], y[columns], scale, Hard(), group, plan), truth(x, y, scale)
    torch.testing.assert_close(result.dx / 3, exact.dx[rows])
    torch.testing.assert_close(result.dy / 3, exact.dy[columns])
    try:
        softclip_loss(x[rows], y[columns], scale, SelfTeacher(swap="paired"), group=Exchange(group, plan))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_what_a_rank_gets_wrong_is_refused(pool, dtype):
    """A rank that keeps its gradients to itself, or a sum over ranks in place of a mean."""
    counts = (20, 25, 20)
    found = pool.run(compute, ("psd",), (counts, counts), "ring", dtype, "auto", ranks=3)
    x, y, scale = operands(65, 65, WIDTH, dtype=dtype)
    standard, right = Standard.of(x, y, scale, ALL_TARGETS["psd"](65, 65)), assembled(found, "psd", dtype)
    standard.check(right)
    for field in ("dx", "dy", "dscale"):
        wrong = dataclasses.replace(right, **{field: 3 * getattr(right, field)})
        with pytest.raises(AssertionError, match=field):
            standard.check(wrong)
        mute = [{"psd": dict(rank["psd"])} for rank in found]
        mute[1]["psd"][field] = np.zeros_like(mute[1]["psd"][field])
        with pytest.raises(AssertionError, match=field):
            standard.check(assembled(mute, "psd", dtype))


@pytest.mark.parametrize("plan", PLANS)
def test_pairs_may_lie_on_two_ranks(pool, plan):
    """Hard() pairs row i with column i wherever the two are; only the paired self teacher needs both on one rank."""
    for message in pool.run(unaligned_hard, plan, ranks=3):
        assert "(10, 30, 20) rows and (25, 5, 30) columns" in message


def reductions(group, plan):
    rank = dist.get_rank(group)
    own = shares((13, 20))[rank]
    x, y, scale = operands(33, 33, WIDTH, dtype=torch.float64)
    target = SQUARE_TARGETS["psd"](33, 33)
    row_losses, column_losses = dense_row_losses(x, y, scale, dense_target(target, x, y, scale))
    losses = softclip_loss(x[own], y[own], scale, target, reduction="none", group=Exchange(group, plan))
    torch.testing.assert_close(losses.rows, row_losses[own])
    torch.testing.assert_close(losses.columns, column_losses[own])
    total = softclip_loss(x[own], y[own], scale, target, reduction="sum", group=Exchange(group, plan))
    dist.all_reduce(total, group=group)
    torch.testing.assert_close(total / 2, (row_losses.sum() + column_losses.sum()) / 2)

    # A gradient for every row and column, and none at all.
    def weighted(*leaves):
        losses = softclip_loss(*leaves, target, reduction="none", group=Exchange(group, plan))
        weights = unit_rows(2, 33, seed=9)[:, own]
        return (losses.rows * weights[0]).sum() + (losses.columns * weights[1]).sum()

    def dense(*leaves):
        rows, columns = dense_row_losses(*leaves, dense_target(target, *leaves))
        weights = unit_rows(2, 33, seed=9)
        return (rows * weights[0]).sum() + (columns * weights[1]).sum()

    found, exact = Result.of(weighted, x[own], y[own], scale), Result.of(dense, x, y, scale)
    torch.testing.assert_close(found.dx, exact.dx[own])
    torch.testing.assert_close(found.dy, exact.dy[own])
    zero = Result.of(lambda *leaves: 0.0 * weighted(*leaves), x[own], y[own], scale)
    assert not zero.dx.any() and not zero.dy.any() and not zero.dscale.any()


@pytest.mark.parametrize("plan", PLANS)
def test_reductions(pool, plan):
    pool.run(reductions, plan, ranks=2)


def retrieval(group, plan, counts, labels):
    rank = dist.get_rank(group)
    rows, columns = (shares(each)[rank] for each in counts)
    n, m = map(sum, counts)
    x = unit_rows(n, WIDTH, dtype=torch.float32)
    y = matching_rows(x, noise=1.5) if n == m else unit_rows(m, WIDTH, seed=1, dtype=torch.float32)
    scale = torch.tensor(20.0)
    _, expected = softclip_loss_with_ranks(x, y, scale, Hard(labels))
    target = Hard(None if labels is None else labels[rows])
    loss, ranks = softclip_loss_with_ranks(x[rows], y[columns], scale, target, group=Exchange(group, plan))
    torch.testing.assert_close(loss, softclip_loss(x[rows], y[columns], scale, target, group=Exchange(group, plan)))
    assert torch.equal(ranks.rows, expected.rows[rows])
    assert torch.equal(ranks.columns, expected.columns[columns])


@pytest.mark.parametrize("plan", PLANS)
def test_retrieval_ranks(pool, plan):
    """Aligned shards need no exchange for the thresholds; unaligned ones and labels do."""
    pool.run(retrieval, plan, ((20, 0, 30, 15),) * 2, None)
    pool.run(retrieval, plan, ((20, 30, 15), (15, 20, 30)), None, ranks=3)
    labels = torch.randint(40, (65,), generator=torch.Generator().manual_seed(0))
    pool.run(retrieval, plan, ((20, 0, 30, 15), (5, 20, 0, 15)), labels)


def local_labels(group, plan):
    """Labels that count a rank's own columns, and the same ones as numbers of global columns: losses and gradients."""
    rank = dist.get_rank(group)
    x, y, scale = operands(65, 48, WIDTH, dtype=torch.float64)
    own_rows, own_columns = shares((20, 1, 30, 14))[rank], shares((15, 20, 6, 7))[rank]
    labels = torch.randint(own_columns.stop - own_columns.start, (own_rows.stop - own_rows.start,))
    for smoothing in (0.0, 0.1):
        local, known = (
            Result.of(
                lambda *leaves, target=target: softclip_loss(*leaves, target, group=Exchange(group, plan)),
                x[own_rows],
                y[own_columns],
                scale,
            )
            for target in (Hard(labels, smoothing, local=True), Hard(labels + own_columns.start, smoothing))
        )
        assert not local.differing(known), (local, known)


@pytest.mark.parametrize("plan", PLANS)
def test_labels_may_count_a_ranks_own_columns(pool, plan):
    pool.run(local_labels, plan)


@pytest.mark.parametrize("plan", PLANS)
def test_any_members_of_the_world(pool, plan):
    """Ranks of a group are not ranks of the world."""
    found = pool.run(compute, ("psd", "labels"), ((20, 25),) * 2, plan, torch.float64, members=(1, 3))
    x, y, scale = operands(45, 45, WIDTH, dtype=torch.float64)
    for name in ("psd", "labels"):
        result, exact = assembled(found, name, torch.float64), truth(x, y, scale, ALL_TARGETS[name](45, 45))
        torch.testing.assert_close(result.dy, exact.dy)


def partitions(group, seed, steps, calls, n):
    """Hashes of the partitions that all ranks drew, by step, in every of `calls` accumulation calls of a step. Between
    them every rank draws other random numbers."""
    psd, found = ProgressiveSelfDistillation(schedules.Constant(0.4), seed), []
    torch.manual_seed(dist.get_rank(group))
    for step in steps:
        hashes = []
        for _ in range(calls):
            np.random.seed(torch.randint(2**31, ()).item())  # noqa: NPY002 (the global generator is meant)
            alpha = psd.at(step, n).target.alpha
            assert alpha.sum() == round(0.4 * n)
            hashes.append(hashlib.sha256(alpha.numpy().tobytes()).hexdigest())
        gathered = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, hashes, group=group)
        found.append({one for hashes in gathered for one in hashes})
    return found


def test_every_rank_draws_one_partition_in_every_accumulation_call(pool):
    steps = (0, 17, 18)
    first, *others = pool.run(partitions, 3, steps, 4, 512)
    assert all(len(hashes) == 1 for hashes in first) and all(other == first for other in others)
    assert len(set.union(*first)) == len(steps), "every step has one of its own"
    assert set.union(*pool.run(partitions, 4, steps, 1, 512)[0]).isdisjoint(set.union(*first)), "and so has every seed"


def test_one_rank_needs_no_exchange(pool):
    """A group of one gives bit for bit what no group gives, and communicates nothing."""
    x, y, scale = operands(65, 65, WIDTH, dtype=torch.float64)
    alone = Result.of(lambda *leaves: softclip_loss(*leaves, SQUARE_TARGETS["psd"](65, 65)), x, y, scale)
    grouped = assembled(
        pool.run(compute, ("psd",), ((65,), (65,)), "ring", torch.float64, ranks=1), "psd", torch.float64
    )
    assert not alone.differing(grouped)
