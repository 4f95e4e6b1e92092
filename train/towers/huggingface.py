"""transformers' CLIP-like models from a folder: `hf:FOLDER`, as save_pretrained writes it or a hub's snapshot holds it,
with the files of its tokenizer and its image processor. Without weights the model begins with random ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from ..options import ConfigError, ModelOptions
from . import groups
from .bundle import Bundle
from .libraries import BOTH_RANDOM, LibraryModel, holds_weights, library, local_folder, mark_locked, packed, width
from .pictures import PerPicture

CONFIG = "config.json"
CROP = (0.9, 1.0)  # share of a picture's area that augmentation keeps, as open_clip's does
PARTS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}


class HuggingFace(LibraryModel):
    """A CLIPModel, SiglipModel or their like."""

    def encode_images(self, images: Tensor) -> Tensor:
        return pooled(self.model.get_image_features(pixel_values=images))

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Padding needs no mask: CLIP reads up to the end token, and SigLIP was trained to read it."""
        return pooled(self.model.get_text_features(input_ids=tokens))


def build(path: str, options: ModelOptions, saved: Path | None) -> Bundle:
    """`path`: what follows `hf:`; `saved`: a folder of the files of a checkpoint. See towers.build."""
    transformers = library("transformers", "hf")
    transforms = library("torchvision.transforms", "hf")
    towers = options.towers
    folder = saved or local_folder(path, CONFIG, towers)
    model = load(transformers, folder, options.options)
    for name in ("get_image_features", "get_text_features", "logit_scale"):
        if not hasattr(model, name):
            raise ConfigError(
                f"model.towers={towers}: {type(model).__name__} has no {name}; allowed: CLIPModel, SiglipModel and "
                "their like"
            )
    size = model.config.vision_config.image_size
    if options.image_size not in (None, size):
        raise ConfigError(f"model.image_size={options.image_size} with model.towers={towers}; allowed: {size}, or null")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    crop = transforms.RandomResizedCrop(size, scale=CROP, interpolation=transforms.InterpolationMode.BICUBIC)
    longest = model.config.text_config.max_position_embeddings
    tokenize = Tokenize(transformers, folder, options.context_length, longest, towers)
    module = HuggingFace(model, options.initial_scale)
    for name, parameter in model.named_parameters():
        if name.startswith(PARTS.get(options.lock, ())):
            parameter.requires_grad_(False)
    mark_locked(module, (value for name, value in model.named_parameters() if name.startswith(PARTS["image"])))
    if options.gradient_checkpointing:
        checkpoint_layers(model)
    return Bundle(
        module,
        PerPicture(partial(_cropped, crop, processor), partial(_processed, processor)),
        tokenize,
        width=width(module, tokenize),
        tokens_per_pair=(size // model.config.vision_config.patch_size) ** 2 + tokenize.length,
        parameter_groups=partial(groups.without_layers, module, towers=towers),
        files=packed(model.config.save_pretrained, processor.save_pretrained, tokenize.tokenizer.save_pretrained),
        preprocessing=json.loads(processor.to_json_string()),
        notes=() if saved or holds_weights(folder) else BOTH_RANDOM,
    )


def load(transformers: Any, folder: Path, options: Mapping[str, Any]) -> Any:
    """The model in `folder`, in fp32; with random weights where it holds none. Code in the folder is never run."""
    transformers.utils.logging.disable_progress_bar()  # every process of a job would draw one
    if holds_weights(folder):
        return transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, **options
        )
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return transformers.AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32, **options)


def checkpoint_layers(model: Any) -> None:
    """Gradient checkpointing, without the gradients of the embeddings that only the reentrant kind needs: they would
    draw a graph through a locked tower."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # the older name leaves in transformers 6
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.disable_input_require_grads()


class Tokenize:
    """Captions → (n, length) int64, cut and padded by the tokenizer in `folder`.

    length   as asked for; None: as much as the tower reads
    longest  positions that the tower knows
    """

    def __init__(self, transformers: Any, folder: Path, length: int | None, longest: int, towers: str) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        longest = min(longest, tokenizer.model_max_length)
        if length is not None and length > longest:
            raise ConfigError(f"model.context_length={length} with model.towers={towers}; allowed: at most {longest}")
        if tokenizer.pad_token_id is None:
            raise ConfigError(f"model.towers={towers}: its tokenizer has no pad_token, which short captions need")
        self.tokenizer, self.length = tokenizer, length or longest

    def __call__(self, captions: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return cast(Tensor, encoded.input_ids)


def pooled(features: Any) -> Tensor:
    """transformers 4 returns the rows themselves."""
    return features if isinstance(features, Tensor) else cast(Tensor, features.pooler_output)


def _processed(processor: Any, image: Image.Image, **options: Any) -> Tensor:
    return cast(Tensor, processor(images=[image], return_tensors="pt", **options).pixel_values[0])


def _cropped(crop: Callable[[Image.Image], Image.Image], processor: Any, image: Image.Image) -> Tensor:
    """Augmented: the crop has the tower's size already, and the processor does the rest."""
    return _processed(processor, crop(image), do_resize=False, do_center_crop=False)
