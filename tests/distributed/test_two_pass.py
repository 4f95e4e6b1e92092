"""An optimiser step in two passes equals that of one process which holds every graph: plain, DDP and ZeRO 0 to 3."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import Pool, run_interpreters
from helpers.towers import COUNTS, data, import_deepspeed, make, split
from torch import nn

from softclip_kernels import Exchange, TwoPass, softclip_loss
from softclip_kernels.testing import SQUARE_TARGETS

STEPS, RATE, CLIP = 2, 0.5, 0.05
# One micro-batch, equal parts of neither share, tails, and more parts than some are rows; None: one pass with autograd.
MICRO_BATCHES = (None, 1, 2, 4, 7)


def target(ranks):
    return SQUARE_TARGETS["psd"](sum(COUNTS[:ranks]), sum(COUNTS[:ranks])) if ranks > 1 else None


@functools.cache
def expected(parts, dropout, dtype, ranks):
    """The parameters after each step of one process that encodes every rank's micro-batches in turn, with that rank's
    random numbers, and holds all their graphs."""
    model = make(dropout, dtype)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    seen = []
    for step in range(STEPS):
        outputs = []
        for rank in range(ranks):
            torch.manual_seed(1000 * step + rank)
            outputs += [model(*batch) for batch in split(data(step, rank, dtype), parts)]
        x, y = (torch.cat([output[k] for output in outputs]) for k in (0, 1))
        loss = softclip_loss(x, y, outputs[0][2], target(ranks))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert norm > 2 * CLIP  # or clipping would not be tested
        assert model.log_scale.grad.abs() > 1e-3 * CLIP  # nor the scale
        optimizer.step()
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    return seen


def assert_same_steps(found, parts, dropout, dtype, ranks):
    start = dict(make(dropout, dtype).named_parameters())
    for step, parameters in enumerate(expected(parts, dropout, dtype, ranks)):
        for name, value in parameters.items():
            moved = (value - start[name]).abs().max().item()
            error = (torch.as_tensor(found[step][name]) - value).abs().max().item()
            allowed = (1e-11 if dtype == torch.float64 else 2e-5) * max(moved, 1e-3)
            allowed += torch.finfo(dtype).eps * value.abs().max().item()  # a parameter's own rounding
            assert error <= allowed, f"step {step}, {name}: error {error:.3e} of a change of {moved:.3e}"


def step_with(model, batch, parts, group, backward, plan="auto"):
    exchange, aims = (Exchange(group, plan), target(dist.get_world_size(group))) if group else (None, None)
    if parts is None:
        backward(softclip_loss(*model(*batch), aims, group=exchange))
        return
    passes = TwoPass(model, split(batch, parts))
    passes.backward(softclip_loss(*passes.outputs, aims, group=exchange))


def train_torch(group, parts, dropout, dtype, ddp, plan="auto"):
    """The parameters after each step, of a plain module or DistributedDataParallel."""
    model = make(dropout, dtype)
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=group) if ddp else model
    rank = dist.get_rank(group) if ddp else 0
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    seen = []
    for step in range(STEPS):
        torch.manual_seed(1000 * step + rank)
        optimizer.zero_grad()
        step_with(wrapped, data(step, rank, dtype), parts, group, torch.Tensor.backward, plan)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        seen.append({name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()})
    return seen


RANKS = 2  # of the fixture `pool`


@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("parts", MICRO_BATCHES)
def test_plain(parts, dropout):
    found = train_torch(None, parts, dropout, torch.float64, False)
    assert_same_steps(found, parts, dropout, torch.float64, 1)


@pytest.mark.parametrize("plan", ("gather", "ring"))
@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("parts", MICRO_BATCHES)
def test_ddp(pool, parts, dropout, plan):
    for found in pool.run(train_torch, parts, dropout, torch.float64, True, plan):
        assert_same_steps(found, parts, dropout, torch.float64, 2)


def test_ddp_on_four_ranks():
    """Blocks that travel further than to a neighbour; ranks with fewer pairs than micro-batches."""
    pool = Pool(4)
    for plan, parts in (("gather", 4), ("ring", 4), ("ring", None)):
        for found in pool.run(train_torch, parts, 0.3, torch.float64, True, plan):
            assert_same_steps(found, parts, 0.3, torch.float64, 4)
    pool.close()


def train_deepspeed(group, cases):
    """For each (stage, parts, dropout, accumulation steps): the parameters after each step of a DeepSpeed engine."""
    deepspeed = import_deepspeed(group)
    results = []
    for stage, parts, dropout, accumulation in cases:
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1_000_000_000,
        }
        model = make(dropout, torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        seen = []
        for step in range(STEPS):
            torch.manual_seed(1000 * step + dist.get_rank(group))
            step_with(engine, data(step, dist.get_rank(group), torch.float32), parts, group, engine.backward)
            engine.step()
            with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
                seen.append({name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()})
        engine.destroy()
        results.append(seen)
    return results


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_deepspeed(pool, stage):
    """Every number of micro-batches; an engine configured for another number of accumulation steps in between."""
    cases = [(stage, parts, dropout, 1) for parts in MICRO_BATCHES for dropout in (0.0, 0.3)]
    cases.append((stage, 4, 0.3, 3))
    for found in pool.run(train_deepspeed, cases):
        for (_, parts, dropout, _), seen in zip(cases, found, strict=True):
            assert_same_steps(seen, parts, dropout, torch.float32, 2)


RUN_AND_LEAVE = """
import os, sys
import torch.distributed as dist
from distributed import test_two_pass
test_two_pass.train_deepspeed(dist.group.WORLD, [(3, 2, 0.0, 1)])
dist.destroy_process_group()
print("all is done")
sys.stdout.flush()
os._exit(0)
"""


def test_deepspeed_processes_end_well():
    """Whole interpreters that end as docs/distributed.md says: the engine first, then the group, then at once."""
    for output in run_interpreters(RUN_AND_LEAVE, 2):
        assert output.endswith("all is done\n")


def reductions(group, parts):
    """How often DDP reduces gradients in one step."""
    model = nn.parallel.DistributedDataParallel(make(0.0, torch.float64), process_group=group)
    calls = []

    def reduce(state, bucket):
        calls.append(bucket.index())
        return dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, reduce)
    step_with(model, data(0, dist.get_rank(group), torch.float64), parts, group, torch.Tensor.backward)
    return calls


def test_ddp_communicates_once(pool):
    for calls in pool.run(reductions, 4):
        assert calls == [0]


def different_numbers(group):
    deepspeed = import_deepspeed(group)
    model = make(0.0, torch.float32)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), RATE),
        config={"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True},
        dist_init_required=False,
    )
    rank = dist.get_rank(group)
    try:
        TwoPass(engine, split(data(0, rank, torch.float32), 2 + rank))
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()


def test_deepspeed_refuses_different_numbers_of_micro_batches(pool):
    for message in pool.run(different_numbers):
        assert "as many micro-batches, but there are [2, 3]" in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropout_on_a_gpu_that_the_model_moves_its_arguments_to():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = make(0.3, torch.float32).cuda()

        def forward(self, images, texts):
            return self.towers(images.cuda(), texts.cuda())

    model, other = Moving(), Moving()
    torch.manual_seed(5)
    passes = TwoPass(model, split(data(0, 0, torch.float32), 3))
    passes.backward(softclip_loss(*passes.outputs))
    torch.manual_seed(5)
    parts = [other(*part) for part in split(data(0, 0, torch.float32), 3)]
    softclip_loss(*(torch.cat([part[k] for part in parts]) for k in (0, 1)), parts[0][2]).backward()
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, another.grad)


class Half(nn.Module):
    """Towers of which None leaves one out."""

    def __init__(self, dropout):
        super().__init__()
        self.towers = make(dropout, torch.float64)

    def forward(self, images, texts):
        nothing, towers = torch.empty(0), self.towers
        return (
            nothing if images is None else nn.functional.normalize(towers.image(images), dim=1),
            nothing if texts is None else nn.functional.normalize(towers.text(texts), dim=1),
            towers.log_scale.exp(),
        )


@pytest.mark.parametrize("locked", (0, 1))
@pytest.mark.parametrize("parts", (1, 3))
def test_a_locked_tower_is_encoded_once_and_changes_no_gradient(locked, parts):
    """The other tower's random numbers included, which both passes draw alike."""
    gradients, calls = [], []
    for told in (None, (), (locked,)):
        model = Half(0.3)
        tower = (model.towers.image, model.towers.text)[locked]
        tower.requires_grad_(False).eval()
        counted = []
        tower.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        torch.manual_seed(5)
        micro_batches = split(data(0, 0, torch.float64), parts)
        if told is None:  # with the graphs of all
            x, y, scales = zip(*(model(*micro_batch) for micro_batch in micro_batches), strict=True)
            softclip_loss(torch.cat(x), torch.cat(y), scales[0]).backward()
        else:
            passes = TwoPass(model, micro_batches, told)
            assert [output.requires_grad for output in passes.outputs] == [k not in told for k in range(3)]
            passes.backward(softclip_loss(*passes.outputs))
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        calls.append(len(counted))
    assert calls == [parts, 2 * parts, parts]
    for expected, *found in zip(*gradients, strict=True):
        for gradient in found:
            torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


def train_half(group, stage):
    """What a locked image tower's engine has for trained parameters after a step, told of the lock and not."""
    deepspeed = import_deepspeed(group)
    seen = []
    for told in ((), (0,)):
        model = Half(0.3).float()
        model.towers.image.requires_grad_(False).eval()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(trained, RATE), config=settings, dist_init_required=False
        )
        torch.manual_seed(dist.get_rank(group))
        passes = TwoPass(engine, split(data(0, dist.get_rank(group), torch.float32), 2), told)
        passes.backward(softclip_loss(*passes.outputs, group=group))
        engine.step()
        with deepspeed.zero.GatheredParameters(trained, enabled=stage == 3):
            seen.append([parameter.detach().numpy().copy() for parameter in trained])
        engine.destroy()
    return seen


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_locked_tower_under_deepspeed(pool, stage):
    start = [parameter.detach() for parameter in Half(0.3).float().towers.text.parameters()]
    for untold, told in pool.run(train_half, stage):
        for one, other in zip(untold, told, strict=True):
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))
        assert not any(torch.equal(torch.as_tensor(one), before) for one, before in zip(told[1:], start, strict=True))


def test_random_numbers_go_on_as_after_one_pass():
    drawn = []
    for parts in (None, 3):
        torch.manual_seed(5)
        batch = data(0, 0, torch.float64)
        model = make(0.3, torch.float64)
        if parts is None:
            for part in split(batch, 3):
                model(*part)
        else:
            step_with(model, batch, parts, None, None)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("model", "micro_batches", "error", "message"),
    (
        (lambda x: (x,), [], ValueError, "micro_batches is empty"),
        (lambda x: x, [(torch.ones(2, 2),)], TypeError, "must return a tuple of tensors, not Tensor"),
        (lambda x: (x, x[:, 0]), [(torch.ones(2, 2),)], ValueError, r"returned shape \(2,\); allowed"),
    ),
)
def test_bad_values(model, micro_batches, error, message):
    with pytest.raises(error, match=message):
        TwoPass(model, micro_batches)


def test_what_changes_between_the_passes_is_refused():
    weight = torch.ones(2, 2, requires_grad=True)
    lengths = iter((4, 3))
    passes = TwoPass(lambda x: (x[: next(lengths)] @ weight,), [(torch.ones(4, 2),)])
    with pytest.raises(RuntimeError, match=r"shape \(4, 2\) and .* in the first pass and has \(3, 2\) and .* in the"):
        passes.backward(passes.outputs[0].sum())
    dtypes = iter((torch.float32, torch.float64))
    passes = TwoPass(lambda x: ((x @ weight).to(next(dtypes)),), [(torch.ones(4, 2),)])
    with pytest.raises(RuntimeError, match=r"torch.float32 in the first pass and has \(4, 2\) and torch.float64 in"):
        passes.backward(passes.outputs[0].sum())
    passes = TwoPass(lambda x: (x @ weight,), [(torch.ones(4, 2),)])
    passes.backward(passes.outputs[0].sum())
    with pytest.raises(RuntimeError, match="good for one step"):
        passes.backward(passes.outputs[0].sum())
