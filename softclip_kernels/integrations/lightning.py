"""The loss in a LightningModule: over all ranks of its trainer, by its trainer's steps, and in two passes.

class Towers(SoftClipMixin, LightningModule):
    def training_step(self, batch, batch_index):
        return self.softclip_loss(*self(*batch), psd.at)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

try:
    from lightning.pytorch.strategies import ModelParallelStrategy
except ImportError as error:
    raise ImportError(
        f"softclip_kernels.integrations.lightning needs lightning 2.6 ({error}): "
        f"pip install softclip-kernels[integrations]"
    ) from error

from ..distributed.exchange import WORLD
from ..distributed.two_pass import MicroBatch, TwoPass
from ..losses.softmax import softclip_loss
from ..targets.base import Target
from ..targets.steps import MakeTarget, at_each_step
from . import hooks
from .hooks import Hook

_HOST = "lightning 2.6"
_LOG = (
    *("name", "value", "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph", "sync_dist"),
    *("sync_dist_group", "add_dataloader_idx", "batch_size", "metric_attribute", "rank_zero_only"),
)
_PRECISION = "lightning.pytorch.plugins.precision:Precision"

HOOKS: tuple[Hook, ...] = (
    Hook(_HOST, "lightning.pytorch:LightningModule.log", _LOG),
    Hook(_HOST, f"{_PRECISION}.pre_backward", ("tensor", "module")),
    Hook(_HOST, f"{_PRECISION}.post_backward", ("tensor", "module")),
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Module
else:
    _Module = object


class SoftClipMixin(_Module):
    """For a LightningModule, before it in the list of bases. Any strategy in which every rank has rows of its own; one
    with tensor parallelism is refused with ValueError, a host of other signatures with UnknownHost."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        hooks.check(HOOKS)
        super().__init__(*arguments, **options)

    def softclip_loss(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor | float,
        target: Target | MakeTarget | None = None,
        *,
        log: str | None = "loss",
        backend: str = "auto",
    ) -> Tensor:
        """The loss of the batch of all ranks, as softclip_loss has it; return it from training_step.

        x, y, logit_scale  this rank's rows (N, D) and (M, D), and the scale, already exponentiated
        target             also a function `make(step, n)`, such as psd.at, for the target of the trainer's step: that
                           of the optimizer, so micro-batches that are accumulated for one share it
        log                the name under which the loss is logged, as its mean over ranks: that is the loss of the
                           batch of all, and a rank's own is not. None: not at all
        """
        target = at_each_step(target, lambda: self.global_step)
        group = self._ranks()
        if self.automatic_optimization:
            self._check_sharded()
        loss = softclip_loss(x, y, logit_scale, target, group=group, backend=backend)
        if log is not None:
            self.log(log, loss.detach(), batch_size=len(x), sync_dist=True)
        return loss

    def two_pass(
        self, micro_batches: Sequence[MicroBatch], locked: Collection[Any] | Mapping[Any, Any] = ()
    ) -> TwoPass:
        """TwoPass of this module's `forward`, which returns embeddings and scale. In manual optimization:

            optimizer.zero_grad()
            passes = self.two_pass(split_batch(batch, size=64))
            loss = self.softclip_loss(*passes.outputs)
            self.two_pass_backward(passes, loss)                     # not manual_backward
            optimizer.step()

        Gradients are averaged over ranks once, for the host's own reduction does not see what happens inside of
        training_step. RuntimeError in automatic optimization, whose own backward pass would follow.
        """
        if self.automatic_optimization:
            raise RuntimeError(
                "two passes bring their own backward pass: set self.automatic_optimization = False in __init__, and "
                "call the optimizer in training_step"
            )
        return TwoPass(self, micro_batches, locked, group=self._ranks())

    def two_pass_backward(self, passes: TwoPass, loss: Tensor) -> None:
        """In the place of manual_backward: what the trainer's precision does to a loss (a GradScaler's scale), and its
        hooks before and after a backward pass, are the same."""
        precision = self.trainer.precision_plugin
        loss = precision.pre_backward(loss, self)
        passes.backward(loss)
        precision.post_backward(loss, self)

    def _ranks(self) -> Any:
        """The `group=` of a loss over everybody who has rows of their own."""
        strategy = self._trainer.strategy if self._trainer is not None else None
        if (
            isinstance(strategy, ModelParallelStrategy)
            and (parts := strategy.device_mesh["tensor_parallel"].size()) > 1
        ):
            raise ValueError(
                f"tensor_parallel_size={parts}: ranks that share a tensor have the same rows, which the loss would "
                f"count {parts} times; allowed: 1"
            )
        return WORLD

    def _check_sharded(self) -> None:
        """Under FSDP2 a parameter of its own is averaged by nobody, unless TwoPass does it."""
        if self._trainer is None or not isinstance(self._trainer.strategy, ModelParallelStrategy):
            return
        shards = [module for module in self.modules() if hasattr(module, "set_requires_gradient_sync")]
        averaged = {id(parameter) for module in shards for parameter in module.parameters()}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and id(parameter) not in averaged:
                raise ValueError(
                    f"{name} is in no module that fully_shard was applied to, so nobody averages its gradient over "
                    f"ranks: end configure_model with fully_shard(self), for which a parameter needs a dimension"
                )
