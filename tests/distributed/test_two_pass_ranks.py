"""In a job of several ranks, two passes never leave a gradient unreduced, and reduce it once."""

from __future__ import annotations

import re
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.towers import data, make, split
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from softclip_kernels import Exchange, TwoPass, softclip_loss
from softclip_kernels.distributed import averaging

RANKS = 2  # of the fixture `pool`


def batch_of(group):
    return data(0, dist.get_rank(group), torch.float64)


def gradients(model):
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def of_a_plain_step(group):
    """One pass under DistributedDataParallel."""
    model = make(0.0, torch.float64)
    wrapped = DistributedDataParallel(model, process_group=group)
    softclip_loss(*wrapped(*batch_of(group)), group=group).backward()
    return gradients(model)


def two_passes(ranks, model, parts, /, **options):
    passes = TwoPass(model, split(batch_of(ranks), parts), **options)
    passes.backward(softclip_loss(*passes.outputs, group=ranks))


def assert_alike(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def message_of(error, function, /, *arguments, **options):
    """What it says when it refuses."""
    try:
        function(*arguments, **options)
    except error as caught:
        return str(caught)
    raise AssertionError("it was not refused")


# A model that nobody reduces.


def refused(group):
    model = make(0.0, torch.float64)
    model.image.register_forward_pre_hook(lambda *_: pytest.fail("it computed"))
    named = message_of(ValueError, two_passes, group, model, 2)
    function = message_of(ValueError, two_passes, group, lambda *batch: model(*batch), 2)
    return named, function


def test_a_model_that_nobody_reduces_is_refused_before_anything_is_computed(pool):
    for messages in pool.run(refused):
        for message in messages:
            assert "nobody reduces the model's gradients over the 2 ranks" in message
            for way_out in ("group=", "DistributedDataParallel", "group='unreduced'"):
                assert way_out in message


def averaged(group, bytes_of_a_bucket):
    """As many micro-batches on every rank, and others; a process group, Exchanges, a wrapper, a method."""
    expected = of_a_plain_step(group)
    for parts, members, call in (
        (3, group, lambda model: model),
        (2 + dist.get_rank(group), Exchange(group, timeout=20.0), lambda model: Wrapper(model)),
        (1, Exchange(), lambda model: model.forward),
        (2, "world", lambda model: model),
    ):
        model = make(0.0, torch.float64)
        with mock.patch.object(averaging, "BUCKET", bytes_of_a_bucket):
            two_passes(group, call(model), parts, group=members)
        assert_alike(gradients(model), expected)


class Wrapper:
    """No module, as some libraries wrap one."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *batch):
        return self.module(*batch)


@pytest.mark.parametrize("bytes_of_a_bucket", (1, 2000, averaging.BUCKET))
def test_with_a_group_its_gradients_are_averaged(pool, bytes_of_a_bucket):
    pool.run(averaged, bytes_of_a_bucket)


def local(group):
    model, alone = make(0.0, torch.float64), make(0.0, torch.float64)
    two_passes(group, model, 3, group="unreduced")
    softclip_loss(*alone(*batch_of(group)), group=group).backward()
    assert_alike(gradients(model), gradients(alone))
    return gradients(model)[0]


def test_unreduced_gradients_are_each_ranks_own(pool):
    first, second = pool.run(local)
    assert not torch.allclose(first, second)


def on_top_of_others(group):
    """Each rank's own, then averaged ones; gradients that are not there are left out."""
    step, rank = of_a_plain_step(group), dist.get_rank(group)
    model = make(0.0, torch.float64)
    kept = model.image[0].weight.grad = torch.full_like(model.image[0].weight, 1.0 + rank)
    before = [0 if gradient is None else gradient for gradient in gradients(model)]
    two_passes(group, model, 2, group=group)
    assert model.image[0].weight.grad is kept  # a view into somebody's bucket, perhaps
    assert_alike(gradients(model), [old + new for old, new in zip(before, step, strict=True)])
    two_passes(group, model, 3, group=group)
    assert_alike(gradients(model), [old + 2 * new for old, new in zip(before, step, strict=True)])


def test_gradients_that_were_there_before_are_left_as_they_are(pool):
    pool.run(on_top_of_others)


class Experts(nn.Module):
    """Parameters that a rank may have no use for."""

    def __init__(self, expert):
        super().__init__()
        self.towers, self.expert = make(0.0, torch.float64), expert
        self.experts = nn.ParameterList(torch.ones(3 + k, dtype=torch.float64) for k in range(4))

    def forward(self, images, texts):
        x, y, scale = self.towers(images, texts)
        return x * self.experts[self.expert].sum(), y, scale


def used_by_some(group):
    model = Experts(dist.get_rank(group))
    with mock.patch.object(averaging, "BUCKET", 30):
        two_passes(group, model, 2, group=group)
    return [None if expert.grad is None else expert.grad.tolist() for expert in model.experts]


def test_a_parameter_that_only_some_ranks_use_counts_as_zero_on_the_others(pool):
    """And what nobody uses gets no gradient, as in one process."""
    first, second = pool.run(used_by_some)
    assert first == second
    assert [None if gradient is None else len(gradient) for gradient in first] == [3, 4, None, None]
    assert all(gradient[0] != 0.0 for gradient in first[:2])


def different_parameters(group):
    model = make(0.0, torch.float64)
    if dist.get_rank(group) == 1:
        model.text.requires_grad_(False)
    return message_of(ValueError, two_passes, group, model, 2, group=group)


def test_ranks_that_train_different_parameters_are_refused(pool):
    for message in pool.run(different_parameters):
        assert re.search(r"the same, but there are rank 0: 9 trained .* rank 1: 5 trained parameters of", message)


def empty_on_one(group):
    micro_batches = split(batch_of(group), 2) if dist.get_rank(group) else []
    return message_of((ValueError, RuntimeError), TwoPass, make(0.0, torch.float64), micro_batches, group=group)


def test_what_is_wrong_on_one_rank_is_an_error_on_all(pool):
    first, second = pool.run(empty_on_one)
    assert "micro_batches is empty" in first and "rank 0 failed with ValueError: micro_batches is empty" in second


def fails_in_the_second_pass(group):
    rank, model, expected = dist.get_rank(group), make(0.0, torch.float64), of_a_plain_step(group)
    model.image[0].weight.grad = kept = torch.ones_like(model.image[0].weight)
    passes = TwoPass(model, split(batch_of(group), 2), group=group)
    loss = softclip_loss(*passes.outputs, group=group)
    handle = model.text.register_forward_hook(lambda *_: None if rank == 0 else 1 / 0)
    message = message_of((ZeroDivisionError, RuntimeError), passes.backward, loss)
    assert model.image[0].weight.grad is kept
    handle.remove()
    model.zero_grad()
    two_passes(group, model, 2, group=group)
    assert_alike(gradients(model), expected)
    return message


def test_a_rank_that_fails_in_the_second_pass_stops_all_and_they_can_go_on(pool):
    first, second = pool.run(fails_in_the_second_pass)
    assert second == "division by zero"
    assert "second pass" in first and "rank 1 failed with ZeroDivisionError: division by zero" in first


def what_cannot_be_averaged(group):
    model = make(0.0, torch.float64)
    model.text = nn.EmbeddingBag(5, 8, sparse=True)
    sharded = make(0.0, torch.float64)
    sharded.image[0].weight = fully_shard(nn.Linear(6, 20), mesh=DeviceMesh.from_group(group, "cpu")).weight
    return (
        message_of(ValueError, two_passes, group, model, 2, group=group),
        message_of(ValueError, two_passes, group, sharded, 2, group=group),
        message_of(TypeError, two_passes, group, lambda *batch: batch, 2, group=group),
        message_of(ValueError, two_passes, group, make(0.0, torch.float64), 2, group="mean"),
    )


def test_what_cannot_be_averaged_is_refused(pool):
    for sparse, sharded, function, spelling in pool.run(what_cannot_be_averaged):
        assert "text makes sparse gradients" in sparse
        assert "image.0.weight is a DTensor" in sharded
        assert "the model is a function; pass a module" in function
        assert "group='mean'; allowed: a process group, 'world', an Exchange, None, 'unreduced'" in spelling


class Whole(nn.Module):
    """As Lightning does it: DistributedDataParallel wraps all of it, and the step inside sees the inner module."""

    def __init__(self, ranks, **options):
        super().__init__()
        self.net, self.ranks, self.options = make(0.0, torch.float64), ranks, options

    def forward(self):
        two_passes(self.ranks, self.net, 3, **self.options)
        return self.net.log_scale


def in_a_step_that_is_wrapped_from_outside(group):
    expected = of_a_plain_step(group)
    whole = Whole(group, group=group)
    wrapped = DistributedDataParallel(whole, process_group=group)
    with wrapped.no_sync():
        wrapped()
    assert_alike(gradients(whole.net), expected)
    (0.0 * wrapped()).sum().backward()  # reduces the other parameters' gradients as well, which are averages already
    return message_of(ValueError, DistributedDataParallel(Whole(group), process_group=group))


def test_the_inner_module_of_a_wrapped_step(pool):
    for message in pool.run(in_a_step_that_is_wrapped_from_outside):
        assert "nobody reduces the model's gradients" in message


# DistributedDataParallel.


class Spare(nn.Module):
    """With a parameter that nobody uses."""

    def __init__(self):
        super().__init__()
        self.towers, self.spare = make(0.0, torch.float64), nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, images, texts):
        return self.towers(images, texts)


def wrapped_in_ddp(group, options):
    """Three steps; how often each reduces."""
    expected, reduced = of_a_plain_step(group), []
    model = Spare() if options.get("find_unused_parameters") else make(0.0, torch.float64)
    wrapped = DistributedDataParallel(model, process_group=group, **options)

    def reduce(_, bucket):
        reduced.append(bucket.index())
        work = dist.all_reduce(bucket.buffer() / dist.get_world_size(group), group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, reduce)
    for _ in range(3):
        model.zero_grad()
        two_passes(group, wrapped, 2 + dist.get_rank(group))
        found = [each for name, each in model.named_parameters() if name != "spare"]
        assert_alike([each.grad for each in found], expected)
    return reduced


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
    ),
    ids=lambda options: " ".join(options) or "plain",
)
def test_every_kind_of_ddp_reduces_once_a_step(pool, options):
    """With different numbers of micro-batches over ranks."""
    for reduced in pool.run(wrapped_in_ddp, options):
        assert reduced == [0, 0, 0]


def with_a_static_graph(group):
    """Three steps with one micro-batch; what is said of more. PyTorch itself would say nothing from the second on."""
    model = make(0.0, torch.float64)
    wrapped = DistributedDataParallel(model, process_group=group, static_graph=True)
    for _ in range(3):
        model.zero_grad()
        two_passes(group, wrapped, 1)
        assert_alike(gradients(model), of_a_plain_step(group))
    model.image.register_forward_pre_hook(lambda *_: pytest.fail("it computed"))
    return message_of(ValueError, two_passes, group, wrapped, 2)


def test_a_static_graph_is_refused_with_several_micro_batches(pool):
    for message in pool.run(with_a_static_graph):
        assert "static_graph=True cannot accumulate" in message and "static_graph=False" in message


def wrapped_in_part(group, parts):
    """Each tower alone, and the scale not at all."""
    expected = of_a_plain_step(group)
    model = make(0.0, torch.float64)
    message = None
    for name in ("image", "text"):
        setattr(model, name, DistributedDataParallel(getattr(model, name), process_group=group))
    message = message_of(ValueError, two_passes, group, model, parts)
    two_passes(group, model, parts, group=group)
    assert_alike(gradients(model), expected)
    return message


def test_towers_that_are_wrapped_apart(pool):
    for message in pool.run(wrapped_in_part, 3):
        assert "nobody reduces the model's gradients" in message


# FSDP2.


class Reductions(TorchDispatchMode):
    """How often gradients are reduced, by the name of the collective."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "reduce" in function.name():
            self.seen[function.name()] += 1
        return function(*arguments, **(options or {}))


def shard(group, whole=True):
    model = make(0.0, torch.float64)
    mesh = DeviceMesh.from_group(group, "cpu")
    for module in (model.image, model.text, *([model] if whole else [])):
        fully_shard(module, mesh=mesh)
    return model


def whole_gradients(model):
    return [each.full_tensor() if hasattr(each, "full_tensor") else each for each in gradients(model)]


def sharded(group, parts):
    """Reductions of two steps in two passes, then of a plain one."""
    expected, model, counts = of_a_plain_step(group), shard(group), []
    for step in range(3):
        model.zero_grad()
        with Reductions() as reductions:
            if step < 2:
                two_passes(group, model, parts)
            else:
                TwoPass(model, split(batch_of(group), parts))  # given up
                loss = sum(output.sum() for output in model(*batch_of(group)))
                loss.backward()
        counts.append(sum(count for name, count in reductions.seen.items() if "scatter" in name))
        if step < 2:
            assert_alike(whole_gradients(model), expected)
    return counts


@pytest.mark.parametrize("parts", (1, 4))
def test_fully_shard_reduces_once_a_step(pool, parts):
    """Once for each of the two towers and the scale. A plain step afterwards finds everything as it was."""
    for counts in pool.run(sharded, parts):
        assert counts == [3, 3, 3]


def sharded_unevenly(group):
    model = shard(group)
    model.image.register_forward_pre_hook(lambda *_: pytest.fail("it computed"))
    return message_of(ValueError, two_passes, group, model, 2 + dist.get_rank(group))


def test_fully_shard_refuses_different_numbers_of_micro_batches(pool):
    for message in pool.run(sharded_unevenly):
        assert "as many micro-batches, but there are [2, 3]" in message


def sharded_in_part(group):
    model = shard(group, whole=False)
    message = message_of(ValueError, two_passes, group, model, 2)
    with Reductions() as reductions:
        two_passes(group, model, 2, group=group)
    assert_alike(whole_gradients(model), of_a_plain_step(group))
    return message, sum(count for name, count in reductions.seen.items() if "scatter" in name)


def test_fully_shard_of_the_towers_alone(pool):
    for message, count in pool.run(sharded_in_part):
        assert "nobody reduces the model's gradients" in message
        assert count == 2
