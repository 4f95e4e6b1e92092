"""Two passes in low precision: under autocast, and in DeepSpeed's float16 with its loss scale."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.towers import data, import_deepspeed, make, split
from torch import nn

from softclip_kernels import TwoPass, softclip_loss

RANKS = 1  # of the fixture `pool`


@pytest.mark.parametrize("inside", (True, False))
def test_autocast(inside):
    """Autocast remembers casts of parameters; the second pass must not get the first one's, which have no graph. And it
    must have the first one's dtypes where, as PyTorch recommends, the backward pass is called after the block. With one
    micro-batch everything is rounded as in one pass; with three, the parts of a gradient are rounded before their sum,
    which is not much: encoding the second time in float32 would change a gradient by as much as 4%."""
    expected = make(0.0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        softclip_loss(*(output.float() for output in expected(*data(0, 0, torch.float32)))).backward()
    for parts, allowed in ((1, 1e-5), (3, 0.01)):
        model = make(0.0, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            passes = TwoPass(model, split(data(0, 0, torch.float32), parts))
            loss = softclip_loss(*(output.float() for output in passes.outputs))
            if inside:
                passes.backward(loss)
        if not inside:
            passes.backward(loss)
        for one, other in zip(expected.parameters(), model.parameters(), strict=True):
            assert (one.grad - other.grad).norm() <= allowed * one.grad.norm()


SMALL = 2.0**-20  # times the loss: its gradients on the embeddings are below float16's range, as in large batches


def small_loss_backward(engine, parts):
    """In one pass (parts: None) or two."""
    batch = data(0, 0, torch.float32)
    if parts is None:
        engine.backward(softclip_loss(*engine(*(tensor.half() for tensor in batch))) * SMALL)
        return
    passes = TwoPass(engine, split([tensor.half() for tensor in batch], parts))
    passes.backward(softclip_loss(*passes.outputs) * SMALL)


def exact_gradients():
    exact = make(0.0, torch.float32)
    (softclip_loss(*exact(*data(0, 0, torch.float32))) * SMALL).backward()
    return {name: parameter.grad for name, parameter in exact.named_parameters()}


def relative_errors(gradients):
    exact = exact_gradients()
    return [((gradients[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact]


def real_engine_errors(group, stage, parts):
    """By the change that a step of gradient descent makes to the engine's fp32 parameters."""
    deepspeed = import_deepspeed(group)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_fp32_param

    # For speed DeepSpeed refuses float16 on a CPU without instructions for it; PyTorch does not.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "fp16": {"enabled": True, "loss_scale": 2**16},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    model, rate = make(0.0, torch.float32), 1 / SMALL
    start = {name: parameter.detach().half().float() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), rate)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    small_loss_backward(engine, parts)
    engine.step()
    changed = {name: safe_get_full_fp32_param(parameter) for name, parameter in model.named_parameters()}
    engine.destroy()
    return relative_errors({name: (start[name] - changed[name]) / rate for name in start})


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_float16_under_deepspeed(pool, stage):
    """Two passes are as accurate as one; unscaled, the embeddings' gradients would be worth nothing here. (Stage 0 is
    left out: there DeepSpeed 0.19.8 divides by the loss scale without having multiplied by it, in one pass too.)"""
    for parts in (None, 2):
        (errors,) = pool.run(real_engine_errors, stage, parts)
        assert max(errors) < 0.005, parts


class Float16Engine(nn.Module):
    """What a DeepSpeed engine does with a loss in float16: it multiplies it with its scale, which the optimizer of one
    or the other stage and version keeps in one or the other place."""

    def __init__(self, scale, zero):
        super().__init__()
        self.module, self.data_parallel_group = make(0.0, torch.float32).half(), dist.group.WORLD
        self.scale, keeper = scale, SimpleNamespace(cur_scale=scale)
        self.optimizer = keeper if zero else SimpleNamespace(loss_scale_config=keeper)

    def forward(self, *batch):
        return self.module(*batch)

    def set_gradient_accumulation_boundary(self, boundary):
        pass

    def gradient_accumulation_steps(self):
        return 1

    def backward(self, loss):
        (loss.float() * self.scale).backward()


def stand_in_errors(group, scale, zero, parts):
    engine = Float16Engine(scale, zero)
    small_loss_backward(engine, parts)
    return relative_errors({name: p.grad.float() / scale for name, p in engine.module.named_parameters()})


@pytest.mark.parametrize("zero", (True, False))
@pytest.mark.parametrize("scale", (2.0**16, 2.0**20))  # both beyond float16 themselves: only float32 may see them
def test_float16_gradients_are_scaled_as_the_engine_does(pool, scale, zero):
    for parts in (None, 2):
        (errors,) = pool.run(stand_in_errors, scale, zero, parts)
        assert max(errors) < 0.005, parts
