"""Progressive self-distillation in a loop that tells the loss of no step: true optimizer steps, one draw for each."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from softclip_kernels import (
    Average,
    EachStep,
    Hard,
    OptimizerSteps,
    ProgressiveSelfDistillation,
    SoftClipLoss,
    schedules,
    softclip_loss,
)
from softclip_kernels.testing import unit_rows

N = 16
PSD = ProgressiveSelfDistillation(schedules.Linear(0.1, 0.9, steps=8), seed=3)
SCALE = torch.tensor(20.0)
RANKS = 2  # of the fixture `pool`


def pairs(seed=0):
    return unit_rows(N, 8, seed=seed, dtype=torch.float32), unit_rows(N, 8, seed=seed + 1, dtype=torch.float32)


def loss_at(step):
    return softclip_loss(*pairs(), SCALE, PSD.at(step, N)).item()


def make(kind=torch.optim.AdamW):
    model = nn.Linear(8, 8)
    optimizer = kind(model.parameters(), lr=1e-3)
    return model, optimizer, OptimizerSteps(optimizer)


def step(model, optimizer):
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", (torch.optim.AdamW, torch.optim.SGD))
@pytest.mark.parametrize("micro_batches", (1, 4))
def test_one_draw_for_every_true_step(kind, micro_batches):
    """Whatever is accumulated. A counter of calls would be at 4, 8, ..."""
    model, optimizer, steps = make(kind)
    loss = SoftClipLoss(EachStep(PSD.at, steps))
    for expected in range(4):
        for _ in range(micro_batches):
            assert loss(*pairs(), SCALE).item() == loss_at(expected)
        step(model, optimizer)
    assert len({loss_at(number) for number in range(4)}) == 4


@pytest.mark.parametrize("kind", (torch.optim.AdamW, torch.optim.SGD))
@pytest.mark.parametrize("followed_first", (True, False))
def test_the_count_is_saved_and_goes_on_with_the_optimizer(kind, followed_first):
    model, optimizer, _ = make(kind)
    for _ in range(3):
        step(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    model, optimizer = nn.Linear(8, 8), None
    optimizer = kind(model.parameters(), lr=1e-3)
    steps = OptimizerSteps(optimizer) if followed_first else OptimizerSteps()
    optimizer.load_state_dict(torch.load(file))
    steps.follow(optimizer)
    assert steps() == 3
    step(model, optimizer)
    assert steps() == 4


def test_a_state_without_a_count_is_no_step_0():
    other = torch.optim.SGD(nn.Linear(8, 8).parameters(), lr=1e-3)
    model, optimizer, steps = make(torch.optim.SGD)
    optimizer.load_state_dict(other.state_dict())
    step(model, optimizer)
    with pytest.raises(RuntimeError, match=r"does not say how many steps it has made.*set\(steps\)"):
        steps()
    steps.set(12)
    step(model, optimizer)
    assert steps() == 13


def test_a_step_that_a_gradient_scaler_skips_does_not_count():
    model, optimizer, steps = make()
    scaler = torch.amp.GradScaler("cpu")
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(factor * model(torch.ones(1, 8)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert steps() == 2


def test_two_counters_of_one_optimizer_count_once():
    model, optimizer, steps = make()
    step(model, optimizer)
    late = OptimizerSteps()
    late.follow(optimizer)
    step(model, optimizer)
    assert steps() == late() == 2


def test_copies_count_the_same_optimizer_and_pickles_keep_the_count():
    """As when a model that holds its loss is copied for a moving average, or saved whole."""
    model, optimizer, steps = make()
    step(model, optimizer)
    loss = SoftClipLoss(EachStep(PSD.at, steps))
    other, saved = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
    step(model, optimizer)
    assert loss(*pairs(), SCALE).item() == other(*pairs(), SCALE).item() == loss_at(2)
    assert saved(*pairs(), SCALE).item() == loss_at(1)


def test_a_function_of_the_host_may_count():
    state = {"global_step": 5}
    target = EachStep(PSD.at, lambda: state["global_step"])
    assert softclip_loss(*pairs(), SCALE, target).item() == loss_at(5)
    halves = Average([Hard(), target])
    assert softclip_loss(*pairs(), SCALE, halves).item() == softclip_loss(
        *pairs(), SCALE, Average([Hard(), PSD.at(5, N)])
    )


def test_a_compiled_model_takes_every_steps_target():
    """The graph breaks at the target: no step is compiled in, and none compiles anew."""
    model, optimizer, steps = make()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    loss = torch.compile(SoftClipLoss(EachStep(PSD.at, steps)), backend=backend)
    compiled = set()
    for expected in range(4):
        assert loss(*pairs(), SCALE).item() == pytest.approx(loss_at(expected), abs=1e-6)
        compiled.add(len(graphs))
        step(model, optimizer)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    (
        (lambda: EachStep(PSD, OptimizerSteps()), TypeError, "make must be callable, such as psd.at"),
        (lambda: EachStep(PSD.at, 3), TypeError, "steps must be callable"),
        (lambda: OptimizerSteps(nn.Linear(2, 2)), TypeError, "optimizer is a Linear; allowed: a torch.optim.Optimizer"),
        (
            lambda: softclip_loss(*pairs(), SCALE, EachStep(PSD.at, lambda: torch.tensor(3))),
            TypeError,
            "the step must be an integer, not Tensor",
        ),
        (
            lambda: softclip_loss(*pairs(), SCALE, EachStep(lambda step, n: None, lambda: 3)),
            TypeError,
            "what make(step, n) returns must be a target",
        ),
    ),
)
def test_bad_values(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def over_ranks(group, steps, mixed):
    rank = dist.get_rank()
    operands = (*pairs(10 * rank), SCALE)
    targets = (EachStep(PSD.at, lambda: steps[rank]), PSD.at(steps[rank], 2 * N))
    try:
        return [
            softclip_loss(*operands, Average([Hard(), target]) if mixed else target, group=group).item()
            for target in targets
        ]
    except ValueError as error:
        return str(error)


def test_over_ranks_the_batch_is_the_global_one(pool):
    for found, expected in pool.run(over_ranks, (5, 5), False):
        assert found == expected


@pytest.mark.parametrize("mixed", (False, True))
def test_ranks_at_different_steps_are_an_error_on_all(pool, mixed):
    for message in pool.run(over_ranks, (5, 6), mixed):
        assert "every rank must bring the same" in message and "step 5" in message and "step 6" in message
