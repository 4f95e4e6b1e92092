"""The DeepSpeed engine: how it is made and loaded, and what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor

from . import checkpoint
from .config import Config
from .engine_files import EngineFiles, tensors
from .model import Clip
from .world import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names of its state
MASTER = "master copy"


def make_engine(model: Clip, config: Config, world: World) -> Any:
    """The DeepSpeed engine. Parameters are fp32 (bf16 is autocast), hence also the master copies that ZeRO keeps.

    Nothing is compiled at the start. The optimizer is PyTorch's: DeepSpeed's own for CPUs gains nothing at this size.
    And DeepSpeed's all-reduce through shared memory is left out: it waits for a lost rank forever.
    """
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameter_groups(options.weight_decay), lr=options.lr, betas=(options.betas[0], options.betas[1])
    )
    settings = {
        "train_micro_batch_size_per_gpu": options.batch_size // world.size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.max_grad_norm,
        "zero_optimization": {"stage": config.job.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model.to(world.device), optimizer=optimizer, config=settings, dist_init_required=False
    )
    engine.checkpoint_engine = EngineFiles()
    engine._copy_recovery_script = lambda folder: None  # a checkpoint holds no code
    return engine


def load_engine(engine: Any, folder: Path) -> None:
    """Go on from the checkpoint in `folder`. Rank 0 has checked it before; files of another model or version are found
    out only here, and raise CheckpointError."""
    try:
        engine.load_checkpoint(str(folder), tag=checkpoint.ENGINE)
    except Exception as error:
        raise checkpoint.CheckpointError(
            f"{folder}: DeepSpeed cannot go on from {checkpoint.ENGINE}/ ({type(error).__name__}: {error}); remove "
            "this checkpoint, so that an older one is used, or start a new run"
        ) from error


def gather_weights(engine: Any, zero_stage: int) -> dict[str, Tensor]:
    """The whole model's parameters, on the CPU; under ZeRO-3 they are gathered, which every rank must take part in."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=zero_stage == 3):
        return {name: tensor.detach().cpu().clone() for name, tensor in engine.module.state_dict().items()}


@torch.no_grad()
def nonfinite(engine: Any, weights: dict[str, Tensor], group: Any) -> list[str]:
    """What holds NaN or infinity of the whole model's `weights`, of their fp32 master copies, and of the moments, of
    which each rank holds its part: by parameter, and the same on every rank. Every rank calls it."""
    local = [*tensors(weights), *tensors(engine.optimizer.state_dict())]
    bad = torch.tensor(float(not all(torch.isfinite(tensor).all() for tensor in local)), device=engine.device)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=group)
    if not bad:
        return []
    names: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, _nonfinite_here(engine, weights), group=group)
    return sorted(set().union(*names)) or ["the optimizer's state"]


def _nonfinite_here(engine: Any, weights: dict[str, Tensor]) -> list[str]:
    """What this rank alone can name."""
    parts = dict(weights)
    for name, parameter in engine.module.named_parameters():
        for key, part in _local_parts(engine, parameter).items():
            parts[f"{name} ({key})"] = part
    return [name for name, part in parts.items() if not torch.isfinite(part).all()]


def _local_parts(engine: Any, parameter: Any) -> dict[str, Tensor]:
    """This rank's part of a parameter's master copy and moments. In ZeRO 1 and 2 by hand: DeepSpeed's own way to the
    moments links those of the first parameter group alone, for the others have none yet when it looks."""
    optimizer = engine.optimizer
    moments = MOMENTS if optimizer.optimizer.state else ()
    if hasattr(parameter, "ds_id"):
        held = {f"moment {key}": safe_get_local_optimizer_state(parameter, key) for key in moments}
        return {MASTER: safe_get_local_fp32_param(parameter), **held}
    mapping = parameter._hp_mapping
    if mapping is None:
        return {}
    address, flat = mapping.get_hp_fragment_address(), optimizer.single_partition_of_fp32_groups
    state = optimizer.optimizer.state.get(flat[mapping.param_group_index], {})
    held = {f"moment {key}": state[key].narrow(0, address.start, address.numel) for key in moments if key in state}
    return {MASTER: mapping.hp_fragment, **held}
