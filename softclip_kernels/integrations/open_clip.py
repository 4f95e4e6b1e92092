"""open_clip's own trainer, 3.3 and 4.x, with SoftClipLoss in ClipLoss's place.

    python -m softclip_kernels.integrations.open_clip -- --train-data pairs.csv --model ViT-B-32 ...
    torchrun --nproc-per-node 8 -m softclip_kernels.integrations.open_clip --psd 0.4 --psd-steps 10000 -- --model ...

What stands after `--` is what open_clip_train.main takes. The `--` is also what keeps torchrun from reading `--logs` as
an option of its own. In a launcher of your own:

    from softclip_kernels.integrations import open_clip
    open_clip.install(target)
    open_clip_train.main.main(flags)
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .. import Losses, OptimizerSteps, ProgressiveSelfDistillation, SoftClipLoss, Teacher, schedules
from ..targets.base import Target
from ..targets.steps import KEY, MakeTarget, at_each_step
from . import hooks
from .hooks import Hook

try:
    import open_clip_train.main as trainer
except ImportError as error:
    raise ImportError(
        f"open_clip's trainer cannot be imported ({error}): pip install softclip-kernels[integrations]"
    ) from error

_log = logging.getLogger(__name__)

_FEATURES = ("image_features", "text_features", "logit_scale")
_TEACHER = ("dist_image_features", "dist_text_features", "dist_logit_scale")
_TASK_LOSS = (
    "*loss", "*default_loss", "*local_loss", "*gather_with_grad", "*cache_labels", "*rank", "*world_size", "*device",
    "*dtype", "*verbose",
)  # fmt: skip


def _hooks(host: str, clip_loss: tuple[str, ...], own: dict[str, tuple[str, ...]]) -> tuple[Hook, ...]:
    shared = {
        "open_clip_train.main:main": ("args",),
        "open_clip_train.main:parse_args": ("args",),
        "open_clip.loss:ClipLoss": clip_loss,
        "open_clip.loss:ClipLoss.forward": (*_FEATURES, "logit_bias", "output_dict"),
        "open_clip.loss:DistillClipLoss.forward": (*_FEATURES, *_TEACHER, "output_dict"),
    }
    return tuple(Hook(host, where, names) for where, names in (shared | own).items())


_CLIP_LOSS = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size")

HOOKS_3 = _hooks(
    "open_clip_torch 3.3",
    (*_CLIP_LOSS, "use_horovod"),
    {
        "open_clip_train.main:create_loss": ("args",),
        "open_clip_train.main:train_one_epoch": (
            "model", "data", "loss", "epoch", "optimizer", "scaler", "scheduler", "dist_model", "args", "tb_writer",
        ),
    },
)  # fmt: skip
HOOKS_4 = _hooks(
    "open_clip_torch 4.2.0.dev0 (89fb801)",
    _CLIP_LOSS,
    {
        "open_clip_train.main:create_task": ("args", "model", "dist_model", "naflex_data_config"),
        "open_clip_train.main:train_one_epoch": ("state", "data", "args", "tb_writer"),
        "open_clip_train.main:TrainState": (
            "task", "optimizer", "scaler", "scheduler", "epoch", "global_step", "samples_seen", "compiled_train_step",
            "losses_ema",
        ),
        "open_clip.task:CLIPTask": ("model", *_TASK_LOSS),
        "open_clip.task:CLIPTask.compute_accum_loss": ("inputs", "inputs_no_accum", "accum_batches"),
        "open_clip.task:DistillCLIPTask": ("student_model", "teacher_model", *_TASK_LOSS),
    },
)  # fmt: skip

_makes_tasks = hasattr(trainer, "create_task")
HOOKS = HOOKS_4 if _makes_tasks else HOOKS_3


class ContrastiveLoss(SoftClipLoss):
    """SoftClipLoss for open_clip's accumulation.

    Under --accum-freq k the host calls its loss k times for a step, each time with the features of the whole batch, of
    which those of one micro-batch carry gradients. So the encoders' gradients add up to the whole batch's. The scale,
    which is in all k calls, would get k times its gradient; here each call gives it the k-th part. That happens on the
    way from the loss to the scale and not on the parameter: FSDP2 puts another parameter in its place, and a hook on a
    parameter must be set anew after a resume.
    """

    def __init__(self, target: Target | None = None, *, accumulated: int = 1, **options: Any) -> None:
        super().__init__(target, **options)
        self.accumulated = accumulated

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, *rest: Any, **named: Any
    ) -> Tensor | Losses | dict[str, Tensor | Losses]:
        """SoftClipLoss's."""
        if self.accumulated > 1 and isinstance(logit_scale, Tensor):
            # The same value, for the two are equal, and that share of the gradient.
            logit_scale = torch.lerp(logit_scale.detach(), logit_scale, 1 / self.accumulated)
        return super().forward(image_features, text_features, logit_scale, *rest, **named)


class DistillationLoss(SoftClipLoss):
    """DistillClipLoss: the contrastive loss, and the cross-entropy of the student's softmax with the teacher's, row by
    row and column by column, each with weight 1. The features (N, D) are the student's, dist_* (N, E) the teacher's;
    both scales are exponentiated. Returns the two losses, or {"contrastive_loss": ..., "distill_loss": ...}.
    """

    def forward(  # type: ignore[override]  # as DistillClipLoss, whose forward is not ClipLoss's either
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
        logit_bias: Tensor | None = None,
        dist_logit_bias: Tensor | None = None,
    ) -> Any:
        # A teacher's bias, one number for all its logits, changes none of its softmaxes.
        teacher = Teacher(dist_image_features, dist_text_features, dist_logit_scale)
        contrastive = super().forward(image_features, text_features, logit_scale, logit_bias)
        distill = super().forward(image_features, text_features, logit_scale, target=teacher)
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)


_ORIGINALS: dict[str, Any] = {}


def install(target: Target | MakeTarget | None = None) -> None:
    """Let open_clip_train.main.main train with SoftClipLoss, until `uninstall`.

    target  None: CLIP's; a Target; or make(step, n), which returns the target of optimizer step `step` for a global
            batch of n pairs, such as psd.at of a ProgressiveSelfDistillation. Steps are counted as the optimizer makes
            them, in its state_dict, which the host saves and resumes: one target a step, whatever is accumulated for it

    With --distill-model the contrastive part has this target. Raises UnknownHost where the installed open_clip is not
    one of those in HOOKS, TypeError for another target, and in main, before anything starts, ValueError for flags that
    ask for another loss: --siglip, --horovod, CoCa models.
    """
    steps = OptimizerSteps()
    each = at_each_step(target, steps)
    uninstall()
    hooks.check(HOOKS)
    make_loss = functools.partial(_make_loss, target=each)
    _replace("parse_args", _parse_args)
    if _makes_tasks:
        _replace("create_task", functools.partial(_create_task, make_loss=make_loss))
    else:
        _replace("create_loss", lambda host, args: make_loss(args))
    if each is not target:  # made of `make`, and in need of the count
        _replace("train_one_epoch", functools.partial(_epoch_4 if _makes_tasks else _epoch_3, steps=steps))


def uninstall() -> None:
    """Give open_clip_train.main its own functions back."""
    for name, original in _ORIGINALS.items():
        setattr(trainer, name, original)
    _ORIGINALS.clear()


def _replace(name: str, replacement: Callable[..., Any]) -> None:
    """Put replacement(original, ...) in the place of original(...), in the module whose globals main looks into."""
    original = _ORIGINALS[name] = getattr(trainer, name)
    setattr(trainer, name, functools.wraps(original)(functools.partial(replacement, original)))


def _parse_args(host: Callable[..., Any], args: list[str]) -> argparse.Namespace:
    parsed = host(args)
    way_out = "Start python -m open_clip_train.main for it"
    if parsed.siglip:
        raise ValueError(f"--siglip trains a sigmoid loss, and SoftClipLoss is a softmax. {way_out}, or leave it out")
    if "coca" in parsed.model.lower():
        raise ValueError(f"--model {parsed.model}: CoCa's loss has a captioning part, SoftClipLoss has none. {way_out}")
    if getattr(parsed, "horovod", False):
        raise ValueError("--horovod: SoftClipLoss communicates by torch.distributed. Start with torchrun instead")
    return parsed


def _make_loss(args: argparse.Namespace, target: Target | None) -> SoftClipLoss:
    """For the ranks that the host counted; SoftClipLoss refuses other numbers than the job's."""
    ranks = {name: getattr(args, name) for name in ("local_loss", "gather_with_grad", "rank", "world_size")}
    loss: SoftClipLoss
    if args.distill:
        loss = DistillationLoss(target, **ranks)
    else:
        loss = ContrastiveLoss(target, accumulated=args.accum_freq, **ranks)
    if args.rank == 0:
        _log.info(f"softclip_kernels: the loss is {loss}, over {args.world_size} processes")
    return loss


def _create_task(
    host: Callable[..., Any],
    args: argparse.Namespace,
    model: Any,
    dist_model: Any = None,
    naflex_data_config: Any = None,
    *,
    make_loss: Callable[[argparse.Namespace], SoftClipLoss],
) -> Any:
    task = host(args, model=model, dist_model=dist_model, naflex_data_config=naflex_data_config)
    if type(task).__name__ not in ("CLIPTask", "DistillCLIPTask"):
        raise ValueError(
            f"--model {args.model} trains by a {type(task).__name__}; allowed: CLIPTask and DistillCLIPTask. Start "
            f"python -m open_clip_train.main for it"
        )
    task.loss = make_loss(args)
    return task


def _epoch_3(
    host: Callable[..., Any],
    model: Any,
    data: Any,
    loss: Any,
    epoch: int,
    optimizer: Optimizer,
    *rest: Any,
    steps: OptimizerSteps,
    **named: Any,
) -> Any:
    args = named["args"] if "args" in named else rest[3]
    _follow(steps, optimizer, epoch * (data["train"].dataloader.num_batches // args.accum_freq))
    return host(model, data, loss, epoch, optimizer, *rest, **named)


def _epoch_4(host: Callable[..., Any], state: Any, *rest: Any, steps: OptimizerSteps, **named: Any) -> Any:
    _follow(steps, state.optimizer, state.global_step)
    return host(state, *rest, **named)


def _follow(steps: OptimizerSteps, optimizer: Optimizer, made: int) -> None:
    """Count this optimizer's steps: on from its own count, or from the host's where a checkpoint brought none, as one
    of another loss, or a sharded one of 4.x."""
    if KEY not in optimizer.param_groups[0]:
        steps.set(made)
        if made:
            _log.info(f"softclip_kernels: the checkpoint does not count the optimizer's steps; going on with {made}")
    steps.follow(optimizer)


def split_flags(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own flags, and the host's. torchrun drops a `--` that comes first, so none is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m softclip_kernels.integrations.open_clip",
        description="open_clip's trainer with SoftClipLoss; what follows -- are the flags of open_clip_train.main",
        allow_abbrev=False,
    )
    parser.add_argument("--psd", type=float, metavar="ALPHA", help="progressive self-distillation up to this share")
    parser.add_argument("--psd-steps", type=int, metavar="N", help="optimizer steps until the share is reached")
    parser.add_argument("--target", metavar="MODULE:MAKE", help="make(step, n) returns the target of a step's n pairs")
    if "--" in arguments:
        cut = arguments.index("--")
        own, flags = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    else:
        own, flags = parser.parse_known_args(arguments)
    if (own.psd is None) != (own.psd_steps is None):
        parser.error("--psd ALPHA and --psd-steps N go together")
    if own.target is not None and own.psd is not None:
        parser.error("give --psd or --target, not both")
    if own.target is not None and not all(own.target.partition(":")):
        parser.error(f"--target {own.target}: allowed is MODULE:MAKE, such as my_package.targets:make")
    return own, flags


def target_of(own: argparse.Namespace) -> Target | MakeTarget | None:
    if own.psd is not None:
        return ProgressiveSelfDistillation(schedules.Linear(0.0, own.psd, own.psd_steps)).at
    if own.target is None:
        return None
    module, _, name = own.target.partition(":")
    return getattr(importlib.import_module(module), name)


def main(arguments: list[str]) -> Any:
    """The launcher: what open_clip_train.main.main returns, None where it trained to the end."""
    own, flags = split_flags(arguments)
    install(target_of(own))
    result = trainer.main(flags)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # the host leaves it, and a process that ends with it may abort
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
