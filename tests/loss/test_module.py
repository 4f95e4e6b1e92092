"""The loss as a module: in ClipLoss's place, copied, pickled, given to hosts that make and call it in their own way."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from softclip_kernels import Exchange, Hard, Losses, SoftClipLoss, softclip_loss
from softclip_kernels.testing import unit_rows

X, Y = (unit_rows(6, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
SCALE = torch.tensor(10.0)
RANKS = 3  # of the fixture `pool`

pytestmark = pytest.mark.filterwarnings("ignore::softclip_kernels.WiringWarning")


def test_a_bias_has_a_gradient_of_zero():
    """None would be no gradient at all: DistributedDataParallel would wait for the parameter for ever."""
    bias = nn.Parameter(torch.tensor([-10.0]))
    loss = SoftClipLoss()(X, Y, SCALE, bias)
    loss.backward()
    assert torch.equal(loss, softclip_loss(X, Y, SCALE)) and torch.equal(bias.grad, torch.zeros(1))
    losses = SoftClipLoss(reduction="none")(X, Y, SCALE, bias)
    assert isinstance(losses, Losses) and losses.rows.requires_grad and losses.columns.requires_grad


@pytest.mark.parametrize("keywords", ({}, {"local_loss": True, "gather_with_grad": True}, {"world_size": 1, "rank": 0}))
def test_clip_loss_keywords_in_one_process(keywords):
    loss = SoftClipLoss(cache_labels=True, **keywords)
    assert loss.group is None and torch.equal(loss(X, Y, SCALE), softclip_loss(X, Y, SCALE))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    (
        (lambda: SoftClipLoss(world_size=2), ValueError, "not initialized: make the loss after init_process_group"),
        (lambda: SoftClipLoss(use_horovod=True), ValueError, "use_horovod=True is not supported"),
        (lambda: SoftClipLoss(group="world", rank=0), ValueError, "group= or ClipLoss's keywords, not both: rank"),
        (lambda: SoftClipLoss(local_los=True), TypeError, "got local_los; allowed: target, .*, local_loss, "),
        (lambda: SoftClipLoss()(X, Y, SCALE, Hard()), TypeError, "give target= by name"),
        (lambda: SoftClipLoss()(X, Y, SCALE, None, Hard()), TypeError, "give target= by name"),
    ),
)
def test_errors_name_the_way_out(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_world_is_nobody_in_one_process():
    loss = SoftClipLoss(group="world")
    assert torch.equal(loss(X, Y, SCALE), softclip_loss(X, Y, SCALE))
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, Y, SCALE), softclip_loss(X, Y, SCALE))


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved(model),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Owner(nn.Module):
    """A model that holds its loss, as Lightning's modules and sentence-transformers' losses do."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.weight = loss, nn.Parameter(torch.ones(()))


def copied(group, how):
    """The losses of a model and of its copy, for each way to name the group."""
    rank = dist.get_rank()
    x, y = X.roll(rank, 0), Y.roll(rank, 1)
    seen = []
    for given in ("world", dist.group.WORLD, Exchange(), Exchange("world", "ring"), Exchange(dist.group.WORLD)):
        model = Owner(SoftClipLoss(Hard(smoothing=0.1), group=given))
        other = COPIES[how](model)
        with torch.no_grad():
            seen.append([each.loss(x, y, SCALE).item() for each in (model, other)])
    local = softclip_loss(x, y, SCALE, Hard(smoothing=0.1)).item()
    return local, seen


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_the_same_group(pool, how):
    for local, seen in pool.run(copied, how):
        assert all(one == other != local for one, other in seen)


def copied_subgroup(group):
    loss = SoftClipLoss(group=group)
    again = copy.deepcopy(loss)
    losses = [each(X, Y, SCALE).item() for each in (loss, again)]
    try:
        pickle.dumps(loss)
    except TypeError as error:
        return losses, str(error)


def test_a_group_of_some_ranks_is_copied_and_not_pickled(pool):
    for (one, other), message in pool.run(copied_subgroup, ranks=2):
        assert one == other and "a group of some of the ranks cannot be pickled" in message


def test_what_was_pickled_with_a_group_loads_where_there_is_none():
    assert torch.equal(pickle.loads(pickle.dumps(SoftClipLoss(group="world")))(X, Y, SCALE), softclip_loss(X, Y, SCALE))


def as_open_clip_makes_it(group):
    rank, size = dist.get_rank(), dist.get_world_size()
    made = SoftClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=size)
    x, y = X.roll(rank, 0), Y.roll(rank, 1)
    losses = [loss(x, y, SCALE).item() for loss in (made, SoftClipLoss(group=dist.group.WORLD))]
    messages = []
    for wrong in ({"rank": rank, "world_size": size + 1}, {"rank": (rank + 1) % size, "world_size": size}):
        with pytest.raises(ValueError, match="but this is rank") as caught:
            SoftClipLoss(**wrong)
        messages.append(str(caught.value))
    return losses, messages


def test_clip_loss_keywords_mean_the_whole_job(pool):
    results = pool.run(as_open_clip_makes_it)
    for rank, ((one, other), messages) in enumerate(results):
        assert one == other and f"this is rank {rank} of {len(results)}" in messages[0]
