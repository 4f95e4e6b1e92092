"""The DeepSpeed engine: how it is made, and how it updates the parameters. What it holds is in engine_state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import nn

from .config import Config
from .deepspeed_options import settings
from .optimizers import make_optimizer
from .towers.bundle import Bundle
from .world import World


@dataclass(frozen=True)
class LossScale:
    """What a loss is multiplied with, so that fp16 holds its gradients: as large as they allow.

    value  the factor, a power of two
    good   updates since it last changed
    """

    value: float = 65536.0
    good: int = 0

    GROW_AFTER = 2000

    def after(self, applied: bool) -> LossScale:
        """Half of it where a gradient overflowed, twice where none did for a long time."""
        if not applied:
            return LossScale(max(self.value / 2, 1.0))
        if self.good + 1 == self.GROW_AFTER:
            return LossScale(self.value * 2)
        return LossScale(self.value, self.good + 1)


def make_engine(bundle: Bundle, config: Config, world: World) -> Any:
    """The DeepSpeed engine of a pair of towers, which are moved to the device.

    Parameters are fp32 whatever the precision, to which the module autocasts, hence also the master copies that ZeRO
    keeps. So fp16 needs a loss scale but none of DeepSpeed's fp16: `engine.scaler` is ours, a LossScale, or None.

    Nothing is compiled at the start. DeepSpeed's all-reduce through shared memory is left out: it waits for a lost rank
    forever.
    """
    made = settings(config, world.size, world.device.type == "cuda")
    for parameter in bundle.module.parameters():
        parameter.data = parameter.data.contiguous()  # engine_state takes pieces of it
    groups = bundle.parameter_groups(config.optimizer.weight_decay, config.optimizer.layer_decay)
    optimizer = make_optimizer(groups, config.optimizer, config.job.zero_stage)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=bundle.module.to(world.device), optimizer=optimizer, config=made, dist_init_required=False
    )
    engine.scaler = LossScale() if config.job.precision == "fp16" else None
    return engine


def loss_scale(engine: Any) -> float:
    """What a loss must be multiplied with before its backward pass; update divides by it."""
    return 1.0 if engine.scaler is None else engine.scaler.value


def update(engine: Any, max_grad_norm: float) -> tuple[bool, float]:
    """Take the optimizer's step with the gradient of loss_scale times the loss, clipped to `max_grad_norm`. Where the
    gradient of any rank is not finite nothing is updated, on no rank. Returns whether the step was taken, and the
    gradient's norm before clipping."""
    scale = loss_scale(engine)
    if engine.zero_optimization():
        # From here on, for DeepSpeed multiplies a loss with it too. It takes the whole gradient's norm first, and
        # updates nothing where that is not finite.
        engine.optimizer.loss_scale = scale
        engine.step()
        engine.optimizer.loss_scale = 1.0
        applied, norm = not engine.optimizer.overflow, float(engine.get_global_grad_norm())
    else:
        applied, norm = _update_replicated(engine, scale, max_grad_norm)
    if engine.scaler is not None:
        engine.scaler = engine.scaler.after(applied)
    return applied, norm


@torch.no_grad()
def _update_replicated(engine: Any, scale: float, max_grad_norm: float) -> tuple[bool, float]:
    """Stage 0: every rank holds the same gradient, the mean over all, so all of them decide alike."""
    parameters = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        gradient /= scale
    norm = nn.utils.get_total_norm(gradients)
    applied = bool(torch.isfinite(norm))
    if applied:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        engine.step()
    engine.zero_grad()
    return applied, float(norm)
