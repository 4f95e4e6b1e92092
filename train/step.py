"""The training step: one page, from a rank's share of the batch to updated parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from torch import Tensor

from softclip_kernels import Exchange, TwoPass, softclip_loss_with_ranks

from .config import Config
from .engine import loss_scale, update
from .targets import target_at
from .teachers import ALONE, Seen, Teachers
from .towers.contrastive import MAX_LOG_SCALE


class Share(Seen, Protocol):
    """What the step asks of a rank's share of a batch, besides what is encoded.

    labels  (b,) int64, of what each pair shows; of those alike, loss.positives=label makes positives
    noise   (b,) int64, above 0 where the caption was made wrong; only where the configuration says that some are
    bad     records that were left out while it was read, counted by reason
    """

    @property
    def labels(self) -> Tensor: ...

    @property
    def noise(self) -> Tensor: ...

    @property
    def bad(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class StepResult:
    """Of the global batch, and the same on every rank.

    applied    the parameters were updated, since the loss and the gradient were finite
    r1_*       in-batch R@1; r1_clean and r1_noisy: image→text, of the pairs whose captions are their own and of those
               whose are not, NaN where there are none; None where data.noise is empty
    scale      the logit scale that the loss was taken with
    grad_norm  before clipping; NaN where the loss is not finite
    bad        records that were left out
    """

    applied: bool
    loss: float
    r1_image_to_text: float
    r1_text_to_image: float
    scale: float
    grad_norm: float
    bad: int
    r1_clean: float | None = None
    r1_noisy: float | None = None


def train_step(
    engine: Any, batch: Share, step: int, config: Config, group: Any, teachers: Teachers = ALONE
) -> StepResult:
    """One optimizer step. Where any rank's loss or gradient is not finite, no rank updates its parameters."""
    for settings in engine.optimizer.param_groups:
        settings["lr"] = config.optimizer.lr_at(step) * settings.get("lr_scale", 1.0)
    micro_batches, pairs = config.optimizer.micro_batches, config.optimizer.batch_size
    (x, y, scale), backward = encode(engine, batch, micro_batches)
    taught = teachers.teach(batch, micro_batches) if config.loss.alpha()(step) > 0.0 else {}
    target = target_at(step, pairs, config.loss, config.job.seed, batch.labels, taught)
    exchange = Exchange(group, step=step)  # errors name the step
    loss, ranks = softclip_loss_with_ranks(x, y, scale, target, group=exchange, backend=config.loss.backend)

    # One exchange before the backward pass: what is logged, and whether every rank's loss is finite.
    bad = loss.new_tensor(sum(batch.bad.values()))
    apart = _apart(ranks.rows == 0, batch.noise) if config.data.noise else []
    local = torch.stack([torch.isfinite(loss), loss.detach(), *ranks.recall(1), bad, *apart]).double()
    dist.all_reduce(local, group=group)
    finite, loss_value, image_to_text, text_to_image, *_ = (local / dist.get_world_size(group)).tolist()
    applied, grad_norm = finite == 1.0, float("nan")
    if applied:
        backward(loss * loss_scale(engine))
        applied, grad_norm = update(engine, config.optimizer.max_grad_norm)
        clamp_log_scale(engine.module.log_scale)
    if applied:
        teachers.follow(engine, step)
    return StepResult(
        applied,
        loss_value,
        image_to_text,
        text_to_image,
        float(scale.detach()),
        grad_norm,
        round(float(local[4])),
        *(local[5::2] / local[6::2]).tolist(),  # r1_clean and r1_noisy, or nothing
    )


def _apart(found: Tensor, noise: Tensor) -> list[Tensor]:
    """Of the pairs whose captions are their own, then of the others: how many were found, and how many there are."""
    return [count.sum() for those in (noise == 0, noise > 0) for count in (found & those, those)]


def encode(engine: Any, batch: Share, micro_batches: int) -> tuple[tuple[Tensor, ...], Callable[[Tensor], None]]:
    """The model's outputs over this rank's share, and what to call with the loss: one pass, or two (see TwoPass)."""
    if micro_batches == 1:
        return engine(batch.images, batch.tokens), engine.backward
    parts = zip(batch.images.tensor_split(micro_batches), batch.tokens.tensor_split(micro_batches), strict=True)
    passes = TwoPass(engine, list(parts), engine.module.locked)
    return passes.outputs, passes.backward


@torch.no_grad()
def clamp_log_scale(log_scale: torch.nn.Parameter) -> None:
    """Keep the scale at or below 100 in the parameter, and in ZeRO's fp32 master copy, of which the optimizer makes the
    next step. Every rank calls it: the master copy is spread over them."""
    if not log_scale.requires_grad:
        return
    master = safe_get_full_fp32_param(log_scale)
    if float((log_scale if master is None else master).max()) <= MAX_LOG_SCALE:  # stage 0 has no master copy
        return
    partitioned = hasattr(log_scale, "ds_id")  # stage 3
    if partitioned:  # piece by piece: DeepSpeed cannot set a whole parameter with fewer elements than ranks
        safe_set_local_fp32_param(log_scale, safe_get_local_fp32_param(log_scale).clamp(max=MAX_LOG_SCALE))
    elif master is not None:
        safe_set_full_fp32_param(log_scale, master.clamp(max=MAX_LOG_SCALE))
    with deepspeed.zero.GatheredParameters([log_scale], modifier_rank=0, enabled=partitioned):
        log_scale.clamp_(max=MAX_LOG_SCALE)
