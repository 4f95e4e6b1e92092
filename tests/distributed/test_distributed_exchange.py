"""What ranks exchange: how many bytes, in which order, in which dtype, by which plan; and what they refuse to."""

from __future__ import annotations

import logging
import random
import re
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.products import Shapes, bytes_sent
from helpers.ranks import Pool, shares
from helpers.sharding import PLANS, WIDTH, local_target, over_ranks

from softclip_kernels import (
    Exchange,
    Hard,
    Mix,
    SelfTeacher,
    SoftClipLoss,
    Teacher,
    backends,
    ops,
    softclip_loss,
    softclip_loss_with_ranks,
)
from softclip_kernels.backends import chunked
from softclip_kernels.distributed import agreement, sharded
from softclip_kernels.targets import ForBatch
from softclip_kernels.testing import SQUARE_TARGETS, operands, truth, unit_rows

RANKS = 4  # of the fixture `pool`


# --- bytes and memory ------------------------------------------------------------------------------------------------


def sent_bytes(group, counts, width, name, dtype, exchange_dtype):
    """The bytes that this rank sends point to point in the forward pass and in the backward pass."""
    own = shares(counts)[dist.get_rank(group)]
    n = sum(counts)
    x, y = (unit_rows(n, width, seed=seed, dtype=dtype)[own].requires_grad_() for seed in (0, 1))
    target = SQUARE_TARGETS[name](n, n)
    exchange = Exchange(group, "ring", exchange_dtype)
    with bytes_sent() as sent:
        loss = softclip_loss(x, y, torch.tensor(10.0), local_target(target, own, own), group=exchange)
        forward = sum(sent)
        loss.backward()
    return forward, sum(sent) - forward


# name: bytes a column brings beside its embedding (its teacher's embedding, vectors), teachers, linear terms
COLUMN_BYTES = {
    "hard": (lambda width, size: 0, 0, 0),
    "smoothing": (lambda width, size: 8, 0, 1),  # an id
    "psd": (lambda width, size: width * size, 1, 0),  # the other side of the pair is the teacher's embedding
    "psd_block": (lambda width, size: width * size + 8, 1, 0),  # and a segment
    "psd_external": (lambda width, size: 24 * 4, 1, 0),  # a float32 teacher of width 24
}


@pytest.mark.parametrize("name", COLUMN_BYTES)
@pytest.mark.parametrize("counts", ((32, 32, 32, 32), (10, 0, 40, 7)), ids=str)
def test_ring_sends_what_the_formula_says(pool, name, counts):
    """docs/distributed.md: every rank passes on every block but the one that its successor began with, and the blocks'
    statistics or gradients but its own."""
    width, (extra, teachers, linear) = 16, COLUMN_BYTES[name]
    operand = width * 4 + extra(width, 4)
    statistics, gradients = 4 * (1 + 2 * teachers), 4 * (1 + teachers)
    forward_result, backward_result = statistics + 4 * linear, width * 4
    backward_operand = operand + statistics + gradients + 4 * linear
    found = pool.run(sent_bytes, counts, width, name, torch.float32, None)
    for rank, (forward, backward) in enumerate(found):
        blocks = sum(counts) - counts[(rank + 1) % 4]
        results = sum(counts) - counts[rank]
        assert forward == blocks * operand + results * forward_result
        assert backward == blocks * backward_operand + results * backward_result


def test_a_smaller_exchange_dtype_halves_the_embeddings(pool):
    full = pool.run(sent_bytes, (32,) * 4, 16, "hard", torch.float32, None)
    half = pool.run(sent_bytes, (32,) * 4, 16, "hard", torch.float32, torch.bfloat16)
    for (forward, backward), (half_forward, half_backward) in zip(full, half, strict=True):
        assert forward - half_forward == backward - half_backward == 3 * 32 * 16 * 2


def shapes(group, counts, name, plan):
    chunked.BLOCK["cpu"] = 48
    own = shares(counts)[dist.get_rank(group)]
    n = sum(counts)
    x, y, scale = operands(n, n, WIDTH, dtype=torch.float32)
    target = local_target(SQUARE_TARGETS[name](n, n), own, own)
    x, y = x[own].clone().requires_grad_(), y[own].clone().requires_grad_()
    with Shapes() as mode:
        softclip_loss(x, y, scale, target, group=Exchange(group, plan)).backward()
    return mode.seen


@pytest.mark.parametrize("name", SQUARE_TARGETS)
def test_ring_holds_no_global_matrix(pool, name):
    """Vectors of the global batch are allowed, and nothing else that long; the gather plan shows that the scan sees it.
    A block's groups are one more than its columns: that of the rows which match none."""
    counts = (40, 60, 50, 47)
    for seen in pool.run(shapes, counts, name, "ring"):
        large = {shape for shape in seen if len(shape) > 1 and max(shape) > max(counts) + 1}
        assert not large, large
    for seen in pool.run(shapes, counts, name, "gather"):
        assert any(len(shape) > 1 and sum(counts) in shape for shape in seen)


# --- dtype of the exchange -------------------------------------------------------------------------------------------


def in_bfloat16(tensor):
    return tensor.bfloat16().to(tensor.dtype)


def with_rounded_columns(target, x, y, scale):
    """The target that the ranks see: the columns of a teacher travel too, and for a paired swap those are x."""
    if isinstance(target, ForBatch):
        return with_rounded_columns(target.target, x, y, scale)
    if not isinstance(target, Mix):
        return target
    soft = target.soft
    if isinstance(soft, Teacher):
        soft = replace(soft, b=in_bfloat16(soft.b))
    elif soft.swap == "paired":
        soft = Teacher(y, in_bfloat16(x), scale if isinstance(soft.scale, str) else soft.scale)
    return replace(target, soft=soft)


def exchanged_in_bfloat16(group, plan, counts, name):
    own = shares(counts)[dist.get_rank(group)]
    n = sum(counts)
    x, y, scale = operands(n, n, WIDTH, dtype=torch.float64)
    target = SQUARE_TARGETS[name](n, n)
    rounded = truth(x, in_bfloat16(y), scale, with_rounded_columns(target, x, y, scale))
    result = over_ranks(x[own], y[own], scale, local_target(target, own, own), group, plan, torch.bfloat16)
    loss = result.loss.clone()
    dist.all_reduce(loss, group=group)
    return [
        (actual - expected).abs().max().item() if actual.numel() else 0.0
        for actual, expected in (
            (loss / len(counts), rounded.loss),
            (result.dx / len(counts), rounded.dx[own]),
            (result.dy / len(counts), rounded.dy[own]),
        )
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_bfloat16_exchange_is_exact_for_rounded_columns(pool, plan):
    """The stated error is that of rounding what the columns bring, once, and nothing else: their embeddings, and their
    teacher's."""
    for name in ("hard", "smoothing", "psd_no_swap", "psd", "psd_own_scale", "psd_external"):
        for errors in pool.run(exchanged_in_bfloat16, plan, (20, 0, 30, 15), name):
            assert max(errors) < 1e-10, name


# --- choice of the plan ----------------------------------------------------------------------------------------------


def chosen_plan(group, n, name, dtype, limit):
    """What a loss of n pairs of width 16 on each rank logs, called twice."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("softclip_kernels")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    agreement._announced.clear()
    x, own = unit_rows(n, 16, dtype=torch.float32), shares((n,) * dist.get_world_size(group))[dist.get_rank(group)]
    target = local_target(SQUARE_TARGETS[name](*(n * dist.get_world_size(group),) * 2), own, own)
    with mock.patch.object(agreement, "GATHER_LIMIT", limit):
        for _ in range(2):
            softclip_loss(x, x, torch.tensor(10.0), target, group=Exchange(group, dtype=dtype))
    logger.removeHandler(handler)
    return [message for message in messages if "exchange plan" in message]


# A column's embeddings, the teacher's too, in the dtype they travel in and the one they are computed with; and its
# gradient in fp32. A teacher of the paired swap has the other side's width 16, the external one 24.
GATHERED_BYTES = (
    ("hard", None, 16 * (4 + 4)),
    ("psd", None, 16 * (4 + 4 + 4)),
    ("psd_external", None, 16 * (4 + 4) + 24 * 4),
    ("hard", torch.bfloat16, 16 * (2 + 4 + 4)),
    ("psd_external", torch.bfloat16, 16 * (2 + 4 + 4) + 24 * (2 + 4)),
)


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize(("name", "dtype", "column"), GATHERED_BYTES)
def test_auto_goes_by_size_and_says_why(pool, name, dtype, column, ranks):
    size = ranks * 10 * column
    for (message,) in pool.run(chosen_plan, 10, name, dtype, size, ranks=ranks):
        assert f"gather chosen for {ranks * 10} columns on {ranks} ranks" in message
    for (message,) in pool.run(chosen_plan, 10, name, dtype, size - 1, ranks=ranks):
        assert "ring chosen" in message and "the ring begins above" in message


# --- agreement -------------------------------------------------------------------------------------------------------


def disagree(group, what, compiled):
    """One rank brings something else; the error of this rank, after which the group must still work."""
    odd = dist.get_rank(group) == 1
    x, y, scale = unit_rows(6, 8), unit_rows(6, 8, seed=1), torch.tensor(10.0, dtype=torch.float64)
    target, exchange, options = Hard(), Exchange(group), {}
    if what == "width" and odd:
        x, y = x[:, :5], y[:, :5]
    if what == "dtype" and odd:
        x, y = x.float(), y.float()
    if what == "no tensor" and odd:
        x = None
    if what == "plan":
        exchange = Exchange(group, "ring" if odd else "gather")
    if what == "target" and odd:
        target = Mix(Hard(), SelfTeacher(5.0), 0.3)
    if what == "teacher width":
        target = Teacher(unit_rows(6, 4 + odd), unit_rows(6, 4 + odd), 5.0)
    if what == "labels":
        target = Hard(torch.full((6,), 99 if odd else 3))
    if what == "alpha":
        target = Mix(Hard(), SelfTeacher(5.0), torch.zeros(5 if odd else 6))
    if what == "sinkhorn":  # the others would already be in its exchange
        target = Mix(SelfTeacher(5.0, normalise="sinkhorn"), Hard(torch.full((6,), 99 if odd else 3)), 0.5)
    if what == "reduction" and odd:
        options["reduction"] = "sum"
    if what == "gradients" and not odd:
        x = x.requires_grad_()
    if what == "ranks" and odd:
        target = Hard(groups=(torch.zeros(6).long(), torch.zeros(6).long()))
    function = softclip_loss_with_ranks if what == "retrieval" and odd else softclip_loss
    if what == "backend" and odd:
        refuse = mock.patch.object(backends.registered()["chunked"], "why_not", return_value="not on this rank")
        refuse.start()
    if what == "backend":
        options["backend"] = "chunked"
    if compiled:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    try:
        function(x, y, scale, target, group=exchange, **options)
    except (RuntimeError, ValueError, TypeError) as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = "no error"
    mock.patch.stopall()
    again = softclip_loss(unit_rows(6, 8), y.double() if what != "width" else unit_rows(6, 8), scale, group=group)
    return message, again.item()


# what differs: what rank 1 says, what the others say
DISAGREEMENTS = {
    "width": ("ValueError: every rank must bring .*rank 1: D=5", "ValueError: every rank must bring .*rank 1: D=5"),
    "dtype": ("rank 1: D=8, torch.float32", "rank 1: D=8, torch.float32"),
    "no tensor": ("TypeError: x must be a torch.Tensor", "RuntimeError: .*rank 1 failed with TypeError: x must be"),
    "plan": ("rank 0: .*plan='gather'.*rank 1: .*plan='ring'",) * 2,
    "target": ("ValueError: .*rank 0: IndexTerm.*rank 1: IndexTerm.*TeacherTerm",) * 2,
    "teacher width": ("rank 1: TeacherTerm.*of width 5",) * 2,
    "labels": (r"ValueError: labels must lie in \[0, 18\)", "RuntimeError: .*rank 1 failed with ValueError: labels"),
    "alpha": ("ValueError: alpha of the rows has shape", "RuntimeError: .*rank 1 failed with ValueError: alpha"),
    "sinkhorn": ("ValueError: labels must lie", "RuntimeError: .*rank 1 failed with ValueError: labels must lie"),
    "reduction": ("rank 0: .*reduction='mean'.*rank 1: .*reduction='sum'",) * 2,
    "gradients": ("rank 0: .*gradients wanted.*rank 1: .*nothing wanted",) * 2,
    "retrieval": ("rank 0: .*nothing wanted.*rank 1: .*ranks wanted",) * 2,
    "backend": (
        "RuntimeError: .*not on this rank",
        "RuntimeError: .*rank 1 failed with RuntimeError: .*not on this rank",
    ),
    "ranks": ("rank 0: IndexTerm.*rank 1: GroupTerm",) * 2,
}


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_a_mismatch_is_an_error_on_every_rank(pool, what, compiled):
    """And no hang: the group works afterwards."""
    results = pool.run(disagree, what, compiled, ranks=3)
    for rank, (message, again) in enumerate(results):
        assert re.search(DISAGREEMENTS[what][rank != 1], message), message
        assert again == pytest.approx(results[0][1])


THREE = (unit_rows(2, 2), unit_rows(2, 2), torch.ones(()))


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: Exchange(plan="star"), "plan='star' is not known; allowed: 'auto', 'gather', 'ring'"),
        (lambda: Exchange(dtype=torch.int8), "dtype=torch.int8; allowed: None, torch.float64"),
        (lambda: Exchange(timeout=0), "timeout=0 seconds must be above 0"),
        (lambda: SoftClipLoss(group=dist.GroupMember.NON_GROUP_MEMBER)(*THREE), "this rank is not a member of group="),
        (lambda: SoftClipLoss(group=Exchange("all"))(*THREE), "group='all' is not known; allowed: 'world'"),
        (lambda: SoftClipLoss(group="all")(*THREE), "group='all' is not known; allowed: 'world'"),
        (lambda: SoftClipLoss(group=3)(*THREE), "group is a int; allowed: None, a torch.distributed group, 'world'"),
    ),
)
def test_bad_values(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def default_group(group):
    x, scale = unit_rows(6, 8, seed=dist.get_rank()), torch.tensor(10.0)
    default = (dist.group.WORLD, Exchange(), "world", Exchange("world"))
    return [softclip_loss(x, x, scale, group=each).item() for each in (group, *default)]


def test_the_default_group_and_its_names(pool):
    for own, *default in pool.run(default_group):
        assert default == [own] * 4


# --- soak ------------------------------------------------------------------------------------------------------------


def soak(group, iterations, seed):
    """Ring iterations of random sizes, targets and delays, before the loss and beside every block. The largest error of
    the embeddings' gradients in float64; and of each iteration this rank's loss and gradient of the scale, and what
    their means over ranks must be."""
    chunked.BLOCK["cpu"] = 1024
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    shared, own = random.Random(seed), random.Random(1000 * seed + rank)
    worst, means = 0.0, []

    def late(compute):
        def computing(*arguments):
            time.sleep(own.choice((0.0, 0.0, 0.0, 0.001, 0.002)))
            return compute(*arguments)

        return computing

    for module, name in ((sharded, "_statistics"), (ops, "block_backward")):
        mock.patch.object(module, name, late(getattr(module, name))).start()
    for _ in range(iterations):
        counts = [shared.choice((0, 1, 2, 3, 5, 8)) for _ in range(world)]
        counts[shared.randrange(world)] += 1
        name = shared.choice(("hard", "psd", "smoothing", "psd_block", "psd_external"))
        part, n = shares(counts)[rank], sum(counts)
        x, y, scale = operands(n, n, WIDTH, dtype=torch.float64)
        target = SQUARE_TARGETS[name](n, n)
        time.sleep(own.choice((0.0, 0.0, 0.001, 0.003)))
        result = over_ranks(x[part], y[part], scale, local_target(target, part, part), group, "ring")
        exact = truth(x, y, scale, target)
        for actual, expected in ((result.dx, exact.dx[part]), (result.dy, exact.dy[part])):
            if actual.numel():
                worst = max(worst, (actual / world - expected).abs().max().item())
        means.append([each.item() for each in (result.loss, result.dscale, exact.loss, exact.dscale)])
    mock.patch.stopall()
    return worst, means


@pytest.mark.parametrize("shortened", (pytest.param(1, marks=pytest.mark.long), 10))
def test_soak(shortened):
    """1,000 iterations in all, or a tenth of them, on 1 to 8 ranks: no hang (the pool's time-out), no wrong result."""
    pool = Pool(8)
    for ranks, most in {1: 20, 2: 400, 3: 280, 4: 140, 5: 60, 6: 40, 7: 30, 8: 30}.items():
        iterations = most // shortened
        found = pool.run(soak, iterations, ranks, ranks=ranks)
        assert max(worst for worst, _ in found) < 1e-10
        loss, dscale, exact_loss, exact_dscale = (
            torch.tensor([means for _, means in found], dtype=torch.float64).mean(0).T
        )
        assert len(loss) == iterations
        assert (loss - exact_loss).abs().max() < 1e-10 and (dscale - exact_dscale).abs().max() < 1e-10
    pool.close()
