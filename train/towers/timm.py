"""An image tower of timm's beside a text tower of transformers', as LiT pairs them: `timm:NAME+hf:FOLDER`. Each ends in
a linear projection to model.embed_dim, which begins at random and is trained even where its tower is locked."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..options import ConfigError, ModelOptions
from . import groups, huggingface
from .bundle import Bundle
from .contrastive import Contrastive
from .libraries import RANDOM, holds_weights, library, local_folder, log_scale, packed, timm_patches, width
from .pictures import PerPicture

SCALE, CONTEXT_LENGTH = 1 / 0.07, 77  # as in CLIP
# timm augments for classification. Captions say left, right and colors, so pictures keep both, and nearly all of
# themselves.
AUGMENTATION = {"scale": huggingface.CROP, "hflip": 0.0, "color_jitter": None}


class Projected(nn.Module):
    """A tower and the linear map of its rows to the shared embedding."""

    def __init__(self, trunk: nn.Module, features: int, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.project = nn.Linear(features, embed_dim, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.project(self.trunk(inputs)))


class MeanOverTokens(nn.Module):
    """(b, L) token ids → (b, width): the mean of a transformer's last states over tokens that are not padding."""

    def __init__(self, model: Any, pad_id: int) -> None:
        super().__init__()
        if hasattr(model, "pooler"):  # another way to one row, which would have parameters without a gradient
            model.pooler = None
        self.model, self.pad_id = model, pad_id

    def forward(self, tokens: Tensor) -> Tensor:
        visible = tokens != self.pad_id
        states = self.model(input_ids=tokens, attention_mask=visible.long()).last_hidden_state
        weights = visible.to(states.dtype).unsqueeze(2)
        return cast(Tensor, (states * weights).sum(1) / weights.sum(1).clamp(min=1))


class TimmAndText(Contrastive):
    def __init__(self, image: Projected, text: Projected, initial_scale: float | None) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.log_scale = log_scale(torch.tensor(SCALE).log(), initial_scale)

    def encode_images(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.image(images))

    def encode_texts(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.text(tokens))


def build(names: str, options: ModelOptions, saved: Path | None) -> Bundle:
    """`names`: what follows `timm:`; `saved`: a folder of the files of a checkpoint. See towers.build."""
    timm, transformers = library("timm", "timm"), library("transformers", "timm")
    towers = options.towers
    name, plus, path = names.partition("+hf:")
    if not plus:
        raise ConfigError(f"model.towers={towers} has no text tower; allowed: timm:NAME+hf:FOLDER")
    trunk = _image_tower(timm, name, options, fresh=saved is None)
    folder = saved or local_folder(path, huggingface.CONFIG, towers)
    text = huggingface.load(transformers, folder, {})
    longest = getattr(text.config, "max_position_embeddings", CONTEXT_LENGTH)
    length = options.context_length or min(longest, CONTEXT_LENGTH)
    tokenize = huggingface.Tokenize(transformers, folder, length, longest, towers)
    if options.lock != "none":
        {"image": trunk, "text": text}[options.lock].requires_grad_(False)
    if options.gradient_checkpointing:
        trunk.set_grad_checkpointing(True)
        huggingface.checkpoint_layers(text)
    features = getattr(trunk, "head_hidden_size", trunk.num_features)
    module = TimmAndText(
        Projected(trunk, features, options.embed_dim),
        Projected(MeanOverTokens(text, tokenize.tokenizer.pad_token_id), text.config.hidden_size, options.embed_dim),
        options.initial_scale,
    )
    size = options.image_size or options.options.get("img_size")
    described = timm.data.resolve_model_data_config(trunk, {"img_size": size})
    loaded = {"image": "checkpoint_path" in options.options, "text": holds_weights(folder)}
    return Bundle(
        module,
        PerPicture(
            timm.data.create_transform(**described, is_training=True, **AUGMENTATION),
            timm.data.create_transform(**described),
        ),
        tokenize,
        width=width(module, tokenize),
        tokens_per_pair=timm_patches(trunk, described["input_size"][1:]) + tokenize.length,
        parameter_groups=partial(groups.with_timm_layers, module, trunk),
        files=packed(text.config.save_pretrained, tokenize.tokenizer.save_pretrained),
        preprocessing=described,
        notes=tuple(RANDOM.format(tower) for tower, known in loaded.items() if not known and not saved),
    )


def _image_tower(timm: Any, name: str, options: ModelOptions, fresh: bool) -> Any:
    """The timm model that gives pooled features, (b, 3, H, W) → (b, features)."""
    arguments = dict(options.options)
    if ":" in name or arguments.get("pretrained"):
        raise ConfigError(
            f"model.towers={options.towers}, model.options={arguments}: nothing is fetched at run time; allowed: a "
            "name of timm's, and model.options.checkpoint_path, a file of its weights"
        )
    if not fresh:
        arguments.pop("checkpoint_path", None)
    trunk = timm.create_model(name, num_classes=0, **arguments)
    if options.image_size is not None and hasattr(trunk, "set_input_size"):
        trunk.set_input_size(img_size=options.image_size)
    return trunk
