"""The loss over ranks in one graph of torch.compile equals the eager one: for every target and option, forward and
backward, whatever the compiler does with memory and order."""

from __future__ import annotations

import gc
import itertools
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import ranks
from helpers.ranks import shares
from helpers.sharding import PLANS, WIDTH, local_target
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from softclip_kernels import (
    EachStep,
    Exchange,
    Hard,
    Mix,
    ProgressiveSelfDistillation,
    SelfTeacher,
    SoftClipLoss,
    Teacher,
    Weighted,
    schedules,
    softclip_loss,
    softclip_loss_with_ranks,
)
from softclip_kernels.distributed import agreement, sharded, torch_private
from softclip_kernels.testing import ALL_TARGETS, RECTANGULAR_TARGETS, SQUARE_TARGETS, Result, operands, unit_rows

RANKS = 2  # of the fixture `pool`

SQUARE = ((20, 13), (20, 13))
RECTANGULAR = ((20, 13), (9, 16))


def compiled(function, backend="aot_eager", **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def share(group, counts, dtype=torch.float64):
    """This rank's x, y and scale of a batch, and where they lie."""
    rows, columns = (shares(each)[dist.get_rank(group)] for each in counts)
    x, y, scale = operands(*map(sum, counts), WIDTH, dtype=dtype)
    return x[rows], y[columns], scale, rows, columns


def operators(group, names, counts, plan):
    """Through the operators as a graph calls them, without the compiler, which sees of a target its parts alone."""
    from softclip_kernels.losses import graph

    x, y, scale, rows, columns = share(group, counts)
    exchange = Exchange(group, plan)
    for name in names:
        target = local_target(ALL_TARGETS[name](sum(counts[0]), sum(counts[1])), rows, columns)

        def traced(x, y, scale, target=target):
            return graph.run_in_graph(graph.Request(x, y, scale, target, group=exchange), exchange)[0]

        eager, found = Result.of_loss(x, y, scale, target, group=exchange), Result.of(traced, x, y, scale)
        assert not found.differing(eager), (name, found.differing(eager))
        assert eager.dx.abs().max() > 0, name


@pytest.mark.parametrize("plan", PLANS)
def test_the_operators_give_the_eager_bits_for_every_target(pool, plan):
    pool.run(operators, tuple(SQUARE_TARGETS), SQUARE, plan)
    pool.run(operators, tuple(RECTANGULAR_TARGETS), RECTANGULAR, plan)


def in_one_graph(group, name, counts, plan):
    x, y, scale, rows, columns = share(group, counts)
    target = local_target(ALL_TARGETS[name](sum(counts[0]), sum(counts[1])), rows, columns)

    def loss(x, y, scale):
        return softclip_loss(x, y, scale, target, group=Exchange(group, plan))

    eager, traced = Result.of(loss, x, y, scale), Result.of(compiled(loss), x, y, scale)
    assert not traced.differing(eager), (name, traced.differing(eager))
    assert eager.dx.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "counts", "plan"),
    (
        ("hard", SQUARE, "gather"),
        ("psd", SQUARE, "ring"),
        ("psd_several_block", SQUARE, "gather"),
        ("labels", RECTANGULAR, "ring"),
        ("groups_smoothing", RECTANGULAR, "gather"),
        ("teacher_sinkhorn", RECTANGULAR, "ring"),
        ("dense_both", RECTANGULAR, "gather"),
    ),
)
def test_a_target_in_one_graph(pool, name, counts, plan):
    pool.run(in_one_graph, name, counts, plan)


OPTIONS = {
    "world": lambda group, x, y, scale: softclip_loss(x, y, scale, group="world"),
    "sum": lambda group, x, y, scale: softclip_loss(x, y, scale, reduction="sum", group=group),
    "rows": lambda group, x, y, scale: softclip_loss(x, y, scale, reduction="none", group=group).rows.square().sum(),
    "exchange": lambda group, x, y, scale: softclip_loss(
        x, y, scale, group=Exchange(group, dtype=torch.bfloat16, timeout=20.0, step=3)
    ),
    "backend": lambda group, x, y, scale: softclip_loss(x, y, scale, group=group, backend="chunked"),
    "scale of one dimension": lambda group, x, y, s: softclip_loss(x, y, s.reshape(1).double(), group=group),
    "float scale": lambda group, x, y, scale: softclip_loss(x, y, 14.0, group=group) + 0 * scale,
    "transposed": lambda group, x, y, scale: softclip_loss(x.T.contiguous().T, y, scale, group=group),
    "target made in the graph": lambda group, x, y, scale: softclip_loss(
        x, y, scale, Mix(Hard(), Teacher(x.detach() * 2, y.detach(), scale.detach()), 0.3), group=group
    ),
}


def option(function):
    OPTIONS[function.__name__] = function


@option
def none(group, x, y, scale):
    losses = softclip_loss(x, y, scale, reduction="none", group=group)
    return (losses.rows * torch.arange(len(x))).sum() + losses.columns.square().sum()


@option
def ranked(group, x, y, scale):
    loss, ranks = softclip_loss_with_ranks(x, y, scale, group=group)
    return loss + ranks.rows.sum() + 3 * ranks.columns.sum()


@option
def module(group, x, y, scale):
    return SoftClipLoss(group=group)(x, y, scale, torch.tensor(-10.0), output_dict=True)["contrastive_loss"]


@option
def autocast(group, x, y, scale):
    with torch.autocast("cpu", torch.bfloat16):
        return softclip_loss(x.bfloat16(), y, scale, group=group)


def with_option(group, name):
    x, y, scale, *_ = share(group, SQUARE, torch.float32)

    def loss(x, y, scale):
        return OPTIONS[name](group, x, y, scale)

    eager, traced = Result.of(loss, x, y, scale), Result.of(compiled(loss), x, y, scale)
    assert not traced.differing(eager), traced.differing(eager)
    assert eager.dx.abs().max() > 0


@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_one_graph(pool, name):
    pool.run(with_option, name)


def one_sided(group, frozen):
    """Which gradients the backward operator asks the kernels for, and what they are."""
    x, y, scale, *_ = share(group, SQUARE)
    leaves = [each.clone().requires_grad_(name not in frozen) for name, each in zip("xys", (x, y, scale), strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    asked, block_backward = [], sharded.ops.block_backward

    def spied(problem, statistics, gradient, wanted, backend):
        asked.append((wanted.x, wanted.y, wanted.scale))
        return block_backward(problem, statistics, gradient, wanted, backend)

    def loss(x, y, scale):
        return softclip_loss(x, y, scale, group=group)

    eager = torch.autograd.grad(loss(*leaves), wanted)
    sharded.ops.block_backward = spied
    try:
        traced = torch.autograd.grad(compiled(loss)(*leaves), wanted)
    finally:
        sharded.ops.block_backward = block_backward
    assert all(torch.equal(*pair) for pair in zip(eager, traced, strict=True))
    assert asked == [tuple(name not in frozen for name in "xys")]


@pytest.mark.parametrize("frozen", ("x", "y", "xs", "ys", "xy"))
def test_a_frozen_operand_costs_no_product_in_a_graph(pool, frozen):
    pool.run(one_sided, frozen)


def inferred(group):
    x, y, scale, *_ = share(group, SQUARE)

    def loss(x, y, scale):
        return softclip_loss(x, y, scale, group=group)

    expected = loss(x, y, scale)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = compiled(loss)(x.clone().requires_grad_(), y, scale)
        assert torch.equal(found, expected) and not found.requires_grad


def test_without_gradients_in_one_graph(pool):
    pool.run(inferred)


def ended(group):
    from softclip_kernels.losses import graph

    x, y, scale, *_ = share(group, SQUARE)
    leaves = [each.clone().requires_grad_() for each in (x, y, scale)]
    step = compiled(lambda x, y, scale: softclip_loss(x * 2, y, scale, group=group))
    gc.collect()
    before = len(graph._kept)
    loss = step(*leaves)
    assert len(graph._kept) == before + 1
    twice = [torch.autograd.grad(loss, leaves, retain_graph=keep) for keep in (True, False)]
    assert all(torch.equal(*pair) for pair in zip(*twice, strict=True))
    assert len(graph._kept) == before  # before the loss goes
    loss = step(*leaves)  # whose backward pass never comes
    assert len(graph._kept) == before + 1
    del loss
    assert len(graph._kept) == before


def test_what_is_kept_goes_with_the_graph(pool):
    pool.run(ended)


def overwritten(group):
    """What a compiler may do between the two operators: use the operands' memory again, and make them anew."""
    from softclip_kernels.losses import graph

    x, y, scale, rows, columns = share(group, RECTANGULAR)
    for name in ("labels", "groups_smoothing", "teacher_potentials", "dense", "blend_vectors"):
        target = local_target(RECTANGULAR_TARGETS[name](33, 25), rows, columns)
        leaves = [each.clone().requires_grad_() for each in (x, y, scale)]
        expected = torch.autograd.grad(softclip_loss(*leaves, target, group=group), leaves)
        calls, over_ranks = [], graph.over_ranks

        def seen(*arguments, calls=calls, over_ranks=over_ranks):
            calls.append(arguments)
            return over_ranks(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph, "over_ranks", seen)
            request = graph.Request(*leaves, target, group=group)
            graph.run_in_graph(request, Exchange(group))
        (tensors, *others) = calls[0]
        used = [tensor.detach().clone() for tensor in tensors]
        again = [tensor.clone() for tensor in used]
        *_, ticket = graph.over_ranks(used, *others)
        for tensor in used:
            tensor.fill_(1)
        one = torch.ones((), dtype=torch.float64)
        found = graph.over_ranks_backward(again, ticket, [one, one[None][:0]], others[-1])
        for gradient, right in zip(found, expected, strict=True):
            assert torch.equal(gradient, right), name


def test_the_operands_memory_may_be_used_again_between_the_passes(pool):
    pool.run(overwritten)


def copied(group):
    from softclip_kernels.losses import graph

    x, y, scale, *_ = share(group, SQUARE)
    with pytest.raises(RuntimeError, match="what the loss over ranks keeps for its backward pass is gone"):
        graph.over_ranks_backward([x, y, scale], torch.tensor([0]), [scale, scale], [True, True, True])


def test_a_copied_ticket_is_an_error_by_name(pool):
    pool.run(copied)


def in_order(group):
    x, y, scale, *_ = share(group, SQUARE)
    leaves = [each.clone().requires_grad_() for each in (x, y, scale)]
    graphs = []

    def keep(module, _):
        graphs.append(module.graph)
        return module.forward

    from torch._dynamo.backends.common import aot_autograd

    def losses(x, y, scale):
        first = softclip_loss(x, y, scale, group=group)
        softclip_loss(x, y, scale * 3, group=group)  # of which nothing is used
        return first + softclip_loss(y, x, scale * 2, Hard(smoothing=0.1), group=group)

    with pytest.MonkeyPatch.context() as patch:
        calls = []
        make_layout = agreement.make_layout
        patch.setattr(agreement, "make_layout", lambda *a: calls.append(1) or make_layout(*a))
        eager = torch.autograd.grad(losses(*leaves), leaves)
        assert len(calls) == 3
        traced = torch.autograd.grad(compiled(losses, aot_autograd(fw_compiler=keep))(*leaves), leaves)
        assert len(calls) == 6  # the unused one as well: another rank may use it
    for gradient, other in zip(traced, eager, strict=True):
        torch.testing.assert_close(gradient, other)
    forward, backward = ([node for node in graph.nodes if "with_effects" in str(node.target)] for graph in graphs)
    assert len(forward) == 3 and len(backward) == 2
    for calls in (forward, backward):
        for one, following in itertools.pairwise(calls):
            assert one in following.args[0].all_input_nodes  # waits for what the other returns


def test_losses_of_one_graph_keep_their_order_on_every_rank(pool):
    pool.run(in_order)


PSD = ProgressiveSelfDistillation(schedules.Constant(0.4))
# What changes from step to step: the loss's options at step k.
CHANGES = {
    "batch size": lambda group, k: {"group": group},
    "step of the exchange": lambda group, k: {"group": Exchange(group, step=k)},
    "share of a teacher": lambda group, k: {
        "group": group,
        "target": Mix(Hard(), SelfTeacher(5.0), torch.tensor(0.1 + 0.1 * k)),
    },
    "pairs that are soft": lambda group, k: {"group": group, "target": PSD.at(k, 9)},
}


def steps_of_one_graph(group, what):
    """How often it is compiled."""
    graphs = []

    def counting(module, _):
        graphs.append(module)
        return module.forward

    loss = compiled(lambda x, y, scale, options: softclip_loss(x, y, scale, **options), counting)
    for k in range(6):
        n = 4 + dist.get_rank(group) + (2 * k if what == "batch size" else 0)
        x, y, scale = unit_rows(n, 8, seed=k), unit_rows(n, 8, seed=k + 9), torch.tensor(10.0, dtype=torch.float64)
        options = CHANGES[what](group, k)
        assert torch.equal(loss(x, y, scale, options), softclip_loss(x, y, scale, **options))
    return len(graphs)


@pytest.mark.parametrize("what", CHANGES)
def test_changing_steps_are_compiled_at_most_twice(pool, what):
    """Once, and once more where a size or a number turns out to change."""
    assert max(pool.run(steps_of_one_graph, what)) <= 2


def not_traced(group):
    x, y, scale, *_ = share(group, SQUARE)
    stands = [3]
    target = EachStep(PSD.at, lambda: stands[0])

    def loss(x, y, scale):
        return softclip_loss(x * 2, y, scale, target, group=group) * 3

    torch.compiler.reset()
    broken = torch.compile(loss, backend="aot_eager")
    for step in (3, 4):
        stands[0] = step
        assert not Result.of(broken, x, y, scale).differing(Result.of(loss, x, y, scale))
    with pytest.raises(Exception, match=r"(?i)torch\.compiler\.disable"):
        compiled(loss)(x, y, scale)


def test_a_target_of_each_step_breaks_the_graph(pool):
    pool.run(not_traced)


def with_an_earlier_torch(group):
    x, y, scale, *_ = share(group, SQUARE)

    def loss(x, y, scale):
        return softclip_loss(x, y, scale, group=group)

    torch_private.IN_GRAPHS = False
    try:
        with pytest.raises(Exception, match=r"(?i)torch\.compiler\.disable"):
            compiled(loss)(x, y, scale)
        torch.compiler.reset()
        broken = Result.of(torch.compile(loss, backend="aot_eager"), x, y, scale)
    finally:
        torch_private.IN_GRAPHS = True
    assert not broken.differing(Result.of(loss, x, y, scale))


def test_a_torch_that_it_was_not_tried_with_breaks_the_graph(pool):
    pool.run(with_an_earlier_torch)


class Step(nn.Module):
    """From pictures to the loss: what a trainer compiles as a whole."""

    def __init__(self, group):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor([2.0]))  # fully_shard takes none without a dimension
        self.loss = SoftClipLoss(group=group)

    def forward(self, images, texts, target):
        x, y = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
        return self.loss(x, y, self.scale.exp(), target=target)


def batch(group, n, step):
    rank = dist.get_rank(group)
    return (torch.randn(n, 6, generator=torch.Generator().manual_seed(7 * step + rank + 100 * k)) for k in (0, 1))


def trained(group, wrapper, whole_step, backend):
    """Parameters after five steps of SGD with momentum, eager and compiled."""
    parameters = []
    n, total = (9, 14)[dist.get_rank(group)], 23
    for traced in (False, True):
        module = model = Step(group)
        if wrapper == "DistributedDataParallel":
            model = DistributedDataParallel(module, process_group=group)
        if wrapper == "fully_shard":
            model = fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(images, texts, target, model=model, optimizer=optimizer):
            loss = model(images, texts, target)
            loss.backward()
            if whole_step:
                optimizer.step()
            return loss

        if traced:
            torch.compiler.reset()
            step = torch.compile(step, backend=backend)
        for k in range(5):
            target = Hard() if k < 2 else PSD.at(k, total)
            step(*batch(group, n, k), target)
            if not whole_step:
                optimizer.step()
            optimizer.zero_grad()
        parameters.append(
            [each.full_tensor() if hasattr(each, "full_tensor") else each.detach() for each in module.parameters()]
        )
    for eager, other in zip(*parameters, strict=True):
        torch.testing.assert_close(eager, other, rtol=0, atol=1e-6)
    started = [each.detach() for each in Step(group).parameters()]
    assert all((eager - start).abs().max() > 1e-4 for eager, start in zip(parameters[0], started, strict=True))


# Under fully_shard without the optimizer, which takes a minute to compile.
@pytest.mark.parametrize("wrapper", ("DistributedDataParallel", "fully_shard"))
def test_a_compiled_step_trains_as_the_eager_one(pool, wrapper):
    pool.run(trained, wrapper, wrapper == "DistributedDataParallel", "aot_eager")


def generated(group):
    from torch._inductor import config

    weight, exchange = unit_rows(6, 6, dtype=torch.float32).requires_grad_(), Exchange(group, timeout=200.0)
    scale = torch.tensor(10.0, requires_grad=True)
    rank = dist.get_rank(group)
    images, texts = (unit_rows((9, 14)[rank], 6, seed=2 * rank + k, dtype=torch.float32) for k in (0, 1))
    psd = PSD.at(3, 23)

    def loss(weight, scale):
        x, y = F.normalize(images @ weight, dim=1), F.normalize(texts @ weight.T, dim=1)
        teacher = Teacher(F.normalize((x + y).detach(), dim=1), y.detach(), 9.0)
        soft = softclip_loss(x, y, scale * 2, Weighted(teacher, 0.5), group=exchange)
        return softclip_loss(x, y, scale, psd, group=exchange) * 2 + soft

    with config.patch(compile_threads=1, fx_graph_cache=False):
        traced = compiled(loss, "inductor")(weight, scale)
        gradients = torch.autograd.grad(traced, (weight, scale))
    eager = loss(weight, scale)
    torch.testing.assert_close(traced, eager)
    for gradient, other in zip(gradients, torch.autograd.grad(eager, (weight, scale)), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(gradient, other)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for CPUs with a C++ compiler")
def test_inductor_gives_the_eager_loss_over_ranks(pool, monkeypatch):
    """Two losses in one graph, with operands that it makes anew for the backward pass."""
    monkeypatch.setattr(ranks, "PATIENCE", 300.0)
    pool.run(generated)
