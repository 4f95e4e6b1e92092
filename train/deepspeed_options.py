"""DeepSpeed's configuration: what the trainer's options say, and the free-form section `deepspeed` beside it.

DeepSpeed passes over a key that it does not know, and some that it knows would undo an option of the trainer. Both are
refused here by name, before anything starts.
"""

from __future__ import annotations

import copy
from typing import Any

from .config import Config, ConfigError

ZERO = "zero_optimization"
# What an option of the trainer says, by DeepSpeed's name for it.
OURS = {
    "train_batch_size": "optimizer.batch_size",
    "train_micro_batch_size_per_gpu": "optimizer.batch_size and optimizer.micro_batches",
    "gradient_accumulation_steps": "optimizer.micro_batches",
    "managed_gradient_accumulation": "optimizer.micro_batches",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.name and the options beside it",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
    "scheduler": "optimizer.schedule",
    "fp16": "job.precision",
    "bf16": "job.precision",
    "bfloat16": "job.precision",
    "amp": "job.precision",
    "torch_autocast": "job.precision",
    "data_types": "job.precision",
    "compile": "model.compile",
    "activation_checkpointing": "model.gradient_checkpointing",
    "checkpoint": "job.checkpoint_every",
    "tensorboard": "job.report",
    "wandb": "job.report",
    "csv_monitor": "job.report",
    "comet": "job.report",
}
OURS_OF_ZERO = {
    "stage": "job.zero_stage",
    "offload_optimizer": "job.offload_optimizer",
    "cpu_offload": "job.offload_optimizer",
    "offload_param": "job.offload_parameters",
    "cpu_offload_param": "job.offload_parameters",
    "cpu_offload_use_pin_memory": "job.offload_optimizer",
    "compute_grad_norm": "optimizer.max_grad_norm",
}
# What DeepSpeed does with the others that change something here; its other sections have no part in this trainer.
PASSED_ON = (
    ZERO,
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_allgather",
    "disable_python_gc",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
    "comms_logger",
    "timers",
    "dump_state",
    "steps_per_print",
    "log_level",
)
# They would keep another state than a checkpoint of the trainer holds, or none that it could hold.
UNSUPPORTED_BY_ZERO = ("zenflow", "legacy_stage1", "elastic_checkpoint", "zero_quantized_nontrainable_weights")


def settings(config: Config, processes: int, on_gpu: bool) -> dict[str, Any]:
    """What deepspeed.initialize takes. Raises ConfigError where the section `deepspeed` holds a key that an option of
    the trainer owns, or that DeepSpeed does not know."""
    check(config.deepspeed)
    job, made = config.job, copy.deepcopy(config.deepspeed)
    zero = made.setdefault(ZERO, {})
    zero["stage"] = job.zero_stage
    # Page-locked memory is for copies to a GPU.
    place = {"device": "cpu", "pin_memory": on_gpu}
    if job.offload_optimizer:
        zero["offload_optimizer"] = dict(place)
    if job.offload_parameters:
        zero["offload_param"] = dict(place)
    return {
        "steps_per_print": 1_000_000_000,
        **made,
        "train_micro_batch_size_per_gpu": config.optimizer.batch_size // processes,
        "gradient_accumulation_steps": 1,
        # At stage 0 DeepSpeed would clip, and step, whatever the gradient is: see engine.update.
        "gradient_clipping": config.optimizer.max_grad_norm if job.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def check(section: dict[str, Any]) -> None:
    """Raise ConfigError where the section `deepspeed` cannot be passed on."""
    _not_ours("deepspeed", section, OURS)
    unknown = sorted(str(key) for key in section if key not in PASSED_ON)
    if unknown:
        raise ConfigError(f"deepspeed.{unknown[0]} means nothing here; allowed: {', '.join(PASSED_ON)}")
    zero = section.get(ZERO, {})
    if not isinstance(zero, dict):
        raise ConfigError(f"deepspeed.{ZERO}={zero!r}; allowed: a mapping of DeepSpeed's options of ZeRO")
    _not_ours(f"deepspeed.{ZERO}", zero, OURS_OF_ZERO)
    for key in UNSUPPORTED_BY_ZERO:
        if key in zero:
            raise ConfigError(f"deepspeed.{ZERO}.{key}={zero[key]!r} is not supported here; leave it out")
    _check_zero(zero)


def _not_ours(section: str, given: dict[str, Any], ours: dict[str, str]) -> None:
    for key in given:
        if key in ours:
            raise ConfigError(f"{section}.{key} is what {ours[key]} says; set that instead")


def _check_zero(zero: dict[str, Any]) -> None:
    """By DeepSpeed's own model of these options, which forbids what it does not know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # takes seconds to import
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = sorted(field.alias or key for key, field in DeepSpeedZeroConfig.model_fields.items())
            allowed = ", ".join(key for key in known if key not in OURS_OF_ZERO)
            raise ConfigError(f"deepspeed.{ZERO}.{name} is unknown to DeepSpeed; allowed: {allowed}") from error
        raise ConfigError(f"deepspeed.{ZERO}.{name}={first['input']!r}: {first['msg']}") from error
