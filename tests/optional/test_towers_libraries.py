"""What is special to the towers of one library: names, weights, layers, and what would be fetched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.libraries import (
    LENGTH,
    SIZE,
    WIDTH,
    hugging_face_kind,
    register_open_clip,
    timm_kind,
    write_bert,
    write_hugging_face,
)
from PIL import Image

from train.options import ConfigError, ModelOptions
from train.towers import build

for library in ("open_clip", "timm", "transformers"):
    pytest.importorskip(library)


def refused(match: str, towers: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        build(ModelOptions(towers, **options), list)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


# open_clip.


def test_open_clip_reads_weights_from_a_file_and_from_a_folder(tmp_path: Path) -> None:
    import open_clip

    name = register_open_clip(tmp_path / "configs", "ViT-weights")
    torch.manual_seed(3)
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    from_file = build(ModelOptions(f"open_clip:{name}:{tmp_path / 'weights.pt'}"), list)
    folder = tmp_path / "copy"
    folder.mkdir()
    for file, content in from_file.files.items():
        (folder / file).write_bytes(content)
    shutil.copy(tmp_path / "weights.pt", folder / "open_clip_pytorch_model.bin")
    from_folder = build(ModelOptions(f"open_clip:local-dir:{folder}"), list)
    for bundle in (from_file, from_folder):
        assert bundle.notes == ()
        for parameter, weight in model.named_parameters():
            if parameter != "logit_scale":
                assert torch.equal(bundle.module.get_parameter(f"model.{parameter}"), weight), parameter
    fresh = build(ModelOptions(f"open_clip:{name}"), list)
    assert len(fresh.notes) == 2 and "random weights" in fresh.notes[0]


def test_open_clip_takes_its_options(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = register_open_clip(tmp_path, "ViT-options")
    options = {"embed_dim": 40, "image_mean": (0.5, 0.5, 0.5), "aug_cfg": {"scale": (1.0, 1.0)}}
    bundle = build(ModelOptions(f"open_clip:{name}", options, image_size=48, context_length=6), list)
    assert bundle.width == 40
    assert bundle.tokenize(["a"]).shape == (1, 6)
    assert bundle.tokens_per_pair == 36 + 6
    images = bundle.prepare([picture()], None)
    assert images.shape == (1, 3, 48, 48)
    assert abs(float(images.mean())) < 0.2, "the mean that was asked for"
    assert "randomly" in caplog.text
    caplog.clear()
    again = build(ModelOptions(f"open_clip:{name}", options, 48, 6), list, files=bundle.files)
    assert "randomly" not in caplog.text, "weights follow"
    again.module.load_state_dict(bundle.module.state_dict())


def test_open_clips_siglip_loses_its_bias_and_gets_one_back(tmp_path: Path) -> None:
    import open_clip

    name = register_open_clip(tmp_path, "ViT-biased")
    options = {"init_logit_bias": -10.0, "init_logit_scale": 2.0}
    module = build(ModelOptions(f"open_clip:{name}", options), list).module
    assert not [key for key in module.state_dict() if "logit" in key]
    assert float(module.log_scale.detach()) == 2.0
    state = module.library_state(module.state_dict())
    open_clip.create_model(name, **options).load_state_dict(state)
    assert float(state["logit_bias"]) == 0.0


def test_an_image_tower_of_timm_in_open_clip_has_layers_and_a_projection(tmp_path: Path) -> None:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "token"}
    name = register_open_clip(tmp_path, "timm-tiny", **vision, timm_proj="linear", image_size=224)
    bundle = build(ModelOptions(f"open_clip:{name}", lock="image"), list)
    assert bundle.module.locked == ()
    assert "locks a part of that tower" in bundle.notes[-1]
    assert bundle.tokens_per_pair == 14 * 14 + LENGTH
    bundle = build(ModelOptions(f"open_clip:{name}"), list)
    module: Any = bundle.module
    scale = {id(p): group.get("lr_scale", 1.0) for group in bundle.parameter_groups(0.1, 0.5) for p in group["params"]}
    assert len(scale) == len(list(module.parameters()))
    assert scale[id(module.model.visual.trunk.cls_token)] == 0.5**12
    assert scale[id(module.model.visual.head.proj.weight)] == scale[id(module.log_scale)] == 1.0


def test_batch_norm_is_noted_unless_it_is_locked(tmp_path: Path) -> None:
    name = register_open_clip(tmp_path, "RN-tiny", layers=[1, 1, 1, 1], width=16, patch_size=None, image_size=64)
    options = ModelOptions(f"open_clip:{name}")
    bundle = build(options, list)
    assert bundle.notes[-1].startswith("batch norm: the loss depends")
    assert bundle.tokens_per_pair == 4 + LENGTH
    locked = build(replace(options, lock="image"), list)
    assert "batch norm" not in str(locked.notes)
    statistics = {key: value.clone() for key, value in locked.module.state_dict().items() if "running" in key}
    locked.module(locked.prepare([picture()] * 2, None), None)
    assert statistics
    assert all(torch.equal(locked.module.state_dict()[key], value) for key, value in statistics.items())
    refused(
        "model.gradient_checkpointing=true .* its image tower has none", options.towers, gradient_checkpointing=True
    )


@pytest.mark.parametrize(
    ("name", "message"),
    (
        ("ViT-B-23", r"has no model 'ViT-B-23'; .* such as .*ViT-B-32"),
        ("ViT-B-32:laion2b_s34b_b79k", r"'laion2b_s34b_b79k' is no file; .* nothing is fetched"),
        ("local-dir:/nowhere", r"/nowhere holds no open_clip_config.json"),
        ("hf-hub:somebody/something", r"has no model 'hf-hub'"),
        ("ViT-B-16-SigLIP", r"takes 'timm/ViT-B-16-SigLIP' from a hub"),
        ("roberta-ViT-B-32", r"takes 'roberta-base' from a hub"),
        ("coca_ViT-B-32", r"is a CoCa"),
    ),
)
def test_open_clip_models_that_cannot_be_had_are_refused(name: str, message: str) -> None:
    refused(message, f"open_clip:{name}")


def test_layer_decay_is_refused_where_the_library_knows_no_layers(tmp_path: Path) -> None:
    name = register_open_clip(tmp_path, "ViT-layers")
    bundle = build(ModelOptions(f"open_clip:{name}"), list)
    with pytest.raises(ConfigError, match=r"optimizer.layer_decay=0.5 with .*ViT-layers; allowed: null, or an image"):
        bundle.parameter_groups(0.1, 0.5)


# transformers.


@pytest.mark.parametrize("kind", ("clip", "siglip"))
def test_pictures_are_those_of_the_librarys_processor(tmp_path: Path, kind: str) -> None:
    from transformers import AutoImageProcessor

    options = hugging_face_kind(tmp_path, kind).options
    prepare = build(options, list).prepare
    processor = AutoImageProcessor.from_pretrained(tmp_path / kind)
    expected = processor(images=[picture()], return_tensors="pt").pixel_values
    assert torch.equal(prepare([picture()], None), expected)
    augmented = prepare([picture()], np.array([1]))
    assert float((augmented - expected).abs().mean()) > 0.1, "cropped"
    assert float(augmented.std()) == pytest.approx(float(expected.std()), rel=0.2), "and normalised alike"


def test_a_folder_without_weights_gives_random_ones_and_says_so(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, "clip")
    (folder / "model.safetensors").unlink()
    bundle = build(ModelOptions(f"hf:{folder}"), list)
    assert len(bundle.notes) == 2 and "random weights" in bundle.notes[0]
    assert bundle.width == WIDTH


def test_siglips_scale_is_kept_and_its_bias_dropped(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, "siglip")
    module = build(ModelOptions(f"hf:{folder}"), list).module
    assert not [key for key in module.state_dict() if "logit" in key]
    assert module.library_state(module.state_dict())["logit_bias"].tolist() == [0.0]


def test_hugging_face_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    refused("/nowhere holds no config.json; allowed", "hf:/nowhere")
    refused("openai/clip-vit-base-patch32 holds no config.json", "hf:openai/clip-vit-base-patch32")
    folder = write_hugging_face(tmp_path / "clip", "clip")
    refused(f"model.image_size=64 with .*; allowed: {SIZE}, or null", f"hf:{folder}", image_size=64)
    refused(f"model.context_length=9 with .*; allowed: at most {LENGTH}", f"hf:{folder}", context_length=9)
    assert build(ModelOptions(f"hf:{folder}", context_length=5), list).tokenize(["a"]).shape == (1, 5)
    refused("BertModel has no get_image_features; allowed: CLIPModel", f"hf:{write_bert(tmp_path / 'bert')}")
    (folder / "model.safetensors").write_bytes(b"no weights")
    refused("cannot be made", f"hf:{folder}")


# timm.


def test_timms_layers_learn_slower_from_layer_to_layer(tmp_path: Path) -> None:
    bundle = build(timm_kind(tmp_path).options, list)
    module: Any = bundle.module
    groups = bundle.parameter_groups(0.1, 0.5)
    scale = {id(parameter): group.get("lr_scale", 1.0) for group in groups for parameter in group["params"]}
    assert len(scale) == len(list(module.parameters()))
    trunk = module.image.trunk
    layers = (trunk.cls_token, trunk.blocks[0].mlp.fc1.weight, trunk.blocks[1].mlp.fc1.weight, trunk.norm.weight)
    assert [scale[id(layer)] for layer in layers] == [0.25, 0.5, 1.0, 1.0], "the last norm is the last block's"
    assert {scale[id(p)] for p in (*module.text.parameters(), module.image.project.weight, module.log_scale)} == {1.0}
    assert all(group["weight_decay"] in (0.0, 0.1) for group in groups)


def test_timm_reads_weights_from_a_file(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    kind = timm_kind(tmp_path)
    torch.manual_seed(3)
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kind.options.options)
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    arguments = {**kind.options.options, "checkpoint_path": str(tmp_path / "trunk.safetensors")}
    bundle = build(replace(kind.options, options=arguments), list)
    assert bundle.notes == ()
    assert torch.equal(
        bundle.module.get_parameter("image.trunk.blocks.0.mlp.fc1.weight"), trunk.blocks[0].mlp.fc1.weight
    )
    assert len(build(kind.options, list).notes) == 1
    (tmp_path / "trunk.safetensors").unlink()
    build(replace(kind.options, options=arguments), list, files=bundle.files)  # a checkpoint needs the file no more


def test_pairs_of_timm_and_transformers_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    folder = write_bert(tmp_path)
    refused("has no text tower; allowed: timm:NAME", "timm:vit_tiny_patch16_224")
    refused("nothing is fetched", f"timm:vit_tiny_patch16_224+hf:{folder}", options={"pretrained": True})
    refused("nothing is fetched", f"timm:hf-hub:somebody/something+hf:{folder}")
    refused("cannot be made .*vit_tiny_patch61", f"timm:vit_tiny_patch61+hf:{folder}")
    refused("holds no config.json", "timm:vit_tiny_patch16_224+hf:bert-base-uncased")
