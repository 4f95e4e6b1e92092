"""transformers' dual encoders and its Trainer: no matrix of all pairs, the batch of all ranks, and two passes.

class CLIP(SoftClipModelMixin, CLIPModel): ...
class ClipTrainer(SoftClipTrainerMixin, Trainer): ...

ClipTrainer(CLIP.from_pretrained(...), arguments, train_dataset=..., target=psd.at).train()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import normalize

try:
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError(
        f"softclip_kernels.integrations.transformers needs transformers 5 ({error}): "
        f"pip install softclip-kernels[integrations]"
    ) from error

from .. import backends, checks
from ..distributed.exchange import WORLD
from ..distributed.micro_batches import split_batch
from ..distributed.two_pass import TwoPass
from ..losses.softmax import softclip_loss
from ..targets.base import Target
from ..targets.hard import Hard
from ..targets.steps import MakeTarget, at_each_step
from . import hooks
from .hooks import Hook, UnknownHost

_HOST = "transformers 5.24"
_IMAGE = ("pixel_values", "interpolate_pos_encoding", "**kwargs")
_TEXT = ("input_ids", "attention_mask", "position_ids", "**kwargs")
_LOSS = ("model", "inputs", "return_outputs", "num_items_in_batch")

HOOKS: tuple[Hook, ...] = (
    Hook(_HOST, "transformers:CLIPModel.get_image_features", _IMAGE),
    Hook(_HOST, "transformers:CLIPModel.get_text_features", _TEXT),
    Hook(_HOST, "transformers:Trainer.training_step", ("model", "inputs", "num_items_in_batch")),
    Hook(_HOST, "transformers:Trainer.compute_loss", _LOSS),
    Hook(_HOST, "transformers:Trainer.prediction_step", ("model", "inputs", "prediction_loss_only", "ignore_keys")),
    Hook(_HOST, "transformers:Trainer._set_signature_columns_if_needed", ()),
)

# Encoders whose own forward was read: normalized features, a logit scale that is exponentiated and nothing else (Aimv2
# clamps it), no bias, one scale, and the plain loss (GroupViT adds another). By name, as importing them takes time.
SUPPORTED = ("CLIPModel", "AltCLIPModel", "ChineseCLIPModel", "MetaClip2Model", "VisionTextDualEncoderModel")

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
    from transformers import Trainer as _Trainer
else:
    _Model = object
    _Trainer = object


@dataclass
class ContrastiveOutput(ModelOutput):
    """image_embeds and text_embeds (N, D) of unit norm; logit_scale () or (1,), already exponentiated."""

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logit_scale: Tensor | None = None


class SoftClipModelMixin(_Model):
    """Before one of SUPPORTED in the list of bases: `forward` returns a ContrastiveOutput, so the logits of all pairs
    are never made. Weights are those of the encoder: from_pretrained and save_pretrained read and write its files.

    forward is what DistributedDataParallel, DeepSpeed and torch.compile see. get_image_features of the model inside
    their wrapper bypasses them: gradients are then not averaged.

    TypeError, before the model is made: another encoder, such as SigLIP's, whose loss is a sigmoid.
    """

    accepts_loss_kwargs = False  # else the Trainer counts "items" in a batch that has a key `labels`

    def __init__(self, *arguments: Any, **options: Any) -> None:
        encoders = [one.__name__ for one in type(self).__mro__ if one.__module__.startswith("transformers.models.")]
        if not set(encoders) & set(SUPPORTED):
            raise TypeError(
                f"{type(self).__name__} is made of {encoders[0] if encoders else 'no encoder of transformers'}; "
                f"allowed: {', '.join(SUPPORTED)}, whose loss is the softmax of scaled similarities. For another "
                f"encoder of that kind return embeddings and scale from a forward of your own, and call softclip_loss"
            )
        super().__init__(*arguments, **options)

    def register_parameter(self, name: str, param: Any) -> None:
        """As every module's. ZeRO-3 cuts parameters as soon as the encoder's __init__ ends, and needs a dimension."""
        super().register_parameter(name, param)
        if name == "logit_scale" and param is not None and is_deepspeed_zero3_enabled():
            give_scale_a_dimension(self)

    def forward(  # names whatever one of the encoders takes, for the Trainer leaves out columns that are not named here
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_loss: bool | None = None,
        **both: Any,
    ) -> ContrastiveOutput:
        """As the encoder's, of which return_loss is refused: softclip_loss takes what this returns, and
        SoftClipTrainerMixin does so. `both`: options of either tower."""
        if return_loss:
            raise ValueError(
                "return_loss=True: this model returns embeddings and scale; give them to softclip_loss, or train it "
                "with SoftClipTrainerMixin"
            )
        both.pop("return_dict", None)  # always an object
        texts = {"attention_mask": attention_mask, "position_ids": position_ids, "token_type_ids": token_type_ids}
        pictures = {"interpolate_pos_encoding": interpolate_pos_encoding}
        return ContrastiveOutput(
            image_embeds=_pooled(self.get_image_features(pixel_values, **_given(pictures), **both)),
            text_embeds=_pooled(self.get_text_features(input_ids, **_given(texts), **both)),
            logit_scale=self.logit_scale.exp(),
        )

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *rest: Any, **options: Any
    ) -> Any:
        """As the encoder's, with its shape of logit_scale."""
        state = dict(self.state_dict() if state_dict is None else state_dict)
        if "logit_scale" in state:
            state["logit_scale"] = state["logit_scale"].reshape(())
        return super().save_pretrained(save_directory, is_main_process, state, *rest, **options)


def give_scale_a_dimension(model: Any) -> None:
    """Let the model's logit_scale have shape (1,): DeepSpeed with several ranks takes no parameter without a dimension.
    It stays the same parameter, so an optimizer may have it already, and states with either shape can be loaded.
    SoftClipTrainerMixin does this by itself; in a loop of your own, call it before accelerator.prepare or
    deepspeed.initialize."""
    if model.logit_scale.dim() == 0:
        model.logit_scale.data = model.logit_scale.data.reshape(1)
        model.register_load_state_dict_pre_hook(_reshape_scale)


def _reshape_scale(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    name = f"{prefix}logit_scale"
    if name in state:
        state[name] = state[name].reshape(1)


class SoftClipTrainerMixin(_Trainer):
    """Before Trainer in the list of bases, for a model with SoftClipModelMixin. Every rank's pairs are contrasted in
    training; evaluation takes the batches as they come, each rank's alone, with `groups` and without `target`.

    target         None: each pair; a Target; or make(step, n), such as psd.at, for the target of the trainer's step,
                   which is the optimizer's: accumulated batches share it
    groups         the batch's key of integer ids (N,): pairs of one id match each other, as in Hard(groups=...)
    micro_batches  in how many a rank's batch is cut for two passes (TwoPass): the loss and the gradients are those of
                   the whole batch, and the towers hold one micro-batch. 1: one pass. Not under DeepSpeed and FSDP
    backend        as softclip_loss takes it

    gradient_accumulation_steps=k is the mean of k batches' losses, each with negatives of its own, also where the batch
    has a key `labels` (for which the host would take the loss as divided by k already); for large batches take
    micro_batches. eval_loss is always reported: a batch without one of args.label_names is a ValueError.

    ValueError: compute_loss_func; target and groups; micro_batches with what is not supported. TypeError: another
    target or model. UnknownHost: a transformers whose hooks are others.
    """

    loss_is_scaled_for_ga = False  # the loss is a batch's mean: the host is to divide it by the number of batches

    def __init__(
        self,
        *arguments: Any,
        target: Target | MakeTarget | None = None,
        groups: str | None = None,
        micro_batches: int = 1,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        hooks.check(HOOKS)
        self.target = at_each_step(target, lambda: self.state.global_step)
        if target is not None and groups is not None:
            raise ValueError(f"give target or groups={groups!r}, not both: groups make the target Hard(groups=...)")
        if checks.whole_number("micro_batches", micro_batches) < 1:
            raise ValueError(f"micro_batches={micro_batches}; at least 1 is needed")
        if options.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would not be called: this trainer's loss is softclip_loss")
        backends.check_name(backend)
        self.groups, self.micro_batches, self.backend = groups, micro_batches, backend
        super().__init__(*arguments, **options)
        if not isinstance(self.model, SoftClipModelMixin):
            raise TypeError(
                f"the model is a {type(self.model).__name__}; allowed: one with SoftClipModelMixin before its other "
                f"bases, as in class CLIP(SoftClipModelMixin, CLIPModel)"
            )
        if self.is_deepspeed_enabled:
            give_scale_a_dimension(self.model)
        if micro_batches > 1 and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"micro_batches={micro_batches} under {'DeepSpeed' if self.is_deepspeed_enabled else 'FSDP'}, whose "
                f"steps accelerate makes; allowed: 1, or TwoPass in a loop of your own"
            )

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs, target = self._taken(inputs, model.training)
        outputs = model(**inputs)
        loss = self._loss(outputs, target, WORLD if model.training else None)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.micro_batches == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs, target = self._taken(self._prepare_inputs(inputs), training=True)
        with self.compute_loss_context_manager():
            passes = TwoPass(model, split_batch(inputs, count=self.micro_batches))
            loss = self._loss(passes.outputs, target, WORLD) / self.current_gradient_accumulation_steps
        scaler = self.accelerator.scaler
        passes.backward(loss if scaler is None else scaler.scale(loss))
        return loss.detach()

    def prediction_step(
        self, model: Any, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        if missing := [name for name in self.label_names if inputs.get(name) is None]:
            raise ValueError(
                f"label_names={self.label_names}, but the batch has no {', '.join(missing)}: the host would report no "
                f"eval_loss. Allowed: keys that the batch has, or none (the loss needs none)"
            )
        # Without return_loss the host computes none; the scale is no row of any prediction.
        ignored = [*(ignore_keys or getattr(self.model.config, "keys_to_ignore_at_inference", ())), "logit_scale"]
        return super().prediction_step(model, {**inputs, "return_loss": True}, prediction_loss_only, ignored)

    def _set_signature_columns_if_needed(self) -> None:
        """The host's list of columns that it leaves in a batch."""
        super()._set_signature_columns_if_needed()
        if self.groups is not None and self.groups not in self._signature_columns:
            self._signature_columns.append(self.groups)

    def _taken(self, inputs: Mapping[str, Any], training: bool) -> tuple[dict[str, Any], Target | None]:
        """The model's inputs, without what collators add for the host's own loss, and the target."""
        left = dict(inputs)
        target: Target | None = None
        if self.groups is not None:
            if self.groups not in left:
                raise ValueError(f"groups={self.groups!r}, but the batch has {', '.join(left)}")
            ids = left[self.groups]
            target = Hard(groups=(ids, ids))
        elif training:
            target = self.target
        for name in ("return_loss", "labels", *self.label_names, self.groups):
            left.pop(name, None)
        return left, target

    def _loss(self, outputs: Mapping[str, Any], target: Target | None, group: Any) -> Tensor:
        x, y, scale = (outputs[name] for name in ("image_embeds", "text_embeds", "logit_scale"))
        return softclip_loss(x, y, scale, target, group=group, backend=self.backend)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _pooled(features: Any) -> Tensor:
    pooled = getattr(features, "pooler_output", None)
    if not isinstance(pooled, Tensor):
        raise UnknownHost(f"features are a {type(features).__name__} without pooler_output; known is {_HOST}")
    return normalize(pooled, dim=-1)
