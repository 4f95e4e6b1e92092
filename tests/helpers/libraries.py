"""Tiny towers of other libraries, with random weights. To be imported before the libraries, for torchvision's sake."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.torchvision_beside_cpu import describe_torchvision
from train.options import ModelOptions

describe_torchvision()

SIZE, LENGTH, WIDTH = 32, 8, 24
WORDS = ("[PAD]", "[START]", "[UNK]", "[END]", "a", "cat", "dog", "red", "blue", "of", "photo")


@dataclass(frozen=True)
class Kind:
    """One kind of towers.

    options  its model options
    rows     the library's own normalised rows: (a Contrastive of this kind, images, tokens) → x, y
    load     a strict load of a library's state into a model that the library makes anew
    block    a part of a layer, which gradient checkpointing runs twice, of a Contrastive
    """

    options: ModelOptions
    rows: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    load: Callable[[dict[str, Tensor]], Any]
    block: Callable[[Any], Any]


def write_tokenizer(folder: Path, length: int) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", 1), ("[END]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[START]",
        eos_token="[END]",
        model_max_length=length,
    ).save_pretrained(folder)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"image_size": SIZE, "patch_size": 8}
VISION = {"layers": 2, "width": 64, "head_width": 32, **PATCHES}
TOKENS = {"vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "bos_token_id": 1, "eos_token_id": 3}


def write_hugging_face(folder: Path, kind: str) -> Path:
    """A folder of a CLIPModel or SiglipModel, of its tokenizer and its processor."""
    import transformers

    names = {"clip": "CLIP", "siglip": "Siglip"}
    config = getattr(transformers, f"{names[kind]}Config")(
        text_config={**SMALL, **TOKENS, "projection_size": 32},
        vision_config={**SMALL, **PATCHES},
        projection_dim=WIDTH,
    )
    torch.manual_seed(1)
    getattr(transformers, f"{names[kind]}Model")(config).save_pretrained(folder)
    if kind == "clip":
        transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    else:
        transformers.SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    write_tokenizer(folder, LENGTH)
    return folder


def write_bert(folder: Path, **options: Any) -> Path:
    """It has dropout, by default."""
    import transformers

    config = transformers.BertConfig(
        **SMALL, vocab_size=len(WORDS), max_position_embeddings=LENGTH, pad_token_id=0, **options
    )
    torch.manual_seed(1)
    transformers.BertModel(config).save_pretrained(folder)
    write_tokenizer(folder, LENGTH)
    return folder


def write_open_clip(folder: Path, **vision: Any) -> str:
    """A folder of a ViT as open_clip reads it, without weights, whose captions are of WORDS: model.towers for it."""
    text = {"context_length": LENGTH, "vocab_size": len(WORDS), "width": 32, "heads": 2, "layers": 2}
    described = {"embed_dim": WIDTH, "vision_cfg": VISION | vision, "text_cfg": text | {"hf_tokenizer_name": "here"}}
    write_tokenizer(folder, LENGTH)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}), encoding="utf-8")
    return f"open_clip:local-dir:{folder}"


def register_open_clip(folder: Path, name: str, **vision: Any) -> str:
    """A ViT that open_clip knows by this name."""
    import open_clip

    text = {"context_length": LENGTH, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(
        json.dumps({"embed_dim": WIDTH, "vision_cfg": VISION | vision, "text_cfg": text}), encoding="utf-8"
    )
    open_clip.add_model_config(folder)
    return name


def open_clip_kind(folder: Path) -> Kind:
    import open_clip

    name = register_open_clip(folder, "ViT-tiny")

    def rows(module: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return module.model.encode_image(images, normalize=True), module.model.encode_text(tokens, normalize=True)

    def load(state: dict[str, Tensor]) -> Any:
        model = open_clip.create_model(name)
        model.load_state_dict(state)
        return model

    return Kind(
        ModelOptions(f"open_clip:{name}"), rows, load, lambda module: module.model.visual.transformer.resblocks[0]
    )


def hugging_face_kind(folder: Path, kind: str) -> Kind:
    import transformers

    folder = write_hugging_face(folder / kind, kind)

    def rows(module: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = module.model.get_image_features(pixel_values=images).pooler_output
        mask = (tokens != 0).long() if kind == "clip" else None  # SigLIP was trained to read the padding
        y = module.model.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output
        return normalize(x, dim=-1), normalize(y, dim=-1)

    def load(state: dict[str, Tensor]) -> Any:
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
        model.load_state_dict(state)
        return model

    return Kind(
        ModelOptions(f"hf:{folder}"), rows, load, lambda module: module.model.vision_model.encoder.layers[0].mlp
    )


def timm_kind(folder: Path, **bert: Any) -> Kind:
    import timm

    folder = write_bert(folder / "bert", **bert)
    arguments = {"depth": 2, "patch_size": 8}
    options = ModelOptions(
        f"timm:vit_tiny_patch16_224+hf:{folder}", options=arguments, image_size=SIZE, embed_dim=WIDTH
    )

    def rows(module: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = module.image.trunk.forward_head(module.image.trunk.forward_features(images))
        visible = tokens != 0
        states = module.text.trunk.model(input_ids=tokens, attention_mask=visible.long()).last_hidden_state
        y = torch.stack([state[kept].mean(0) for state, kept in zip(states, visible, strict=True)])
        return normalize(module.image.project(x), dim=-1), normalize(module.text.project(y), dim=-1)

    def load(state: dict[str, Tensor]) -> Any:
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE, **arguments)
        prefix = "image.trunk."
        model.load_state_dict({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
        return model

    return Kind(options, rows, load, lambda module: module.image.trunk.blocks[0].mlp)
