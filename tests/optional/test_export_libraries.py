"""Exports as others load them: by their own library alone, its preprocessing and its tokenizer, for the rows that the
checkpoint gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.exports import write_run
from helpers.libraries import LENGTH, Kind, hugging_face_kind, register_open_clip, timm_kind, write_open_clip
from PIL import Image, ImageOps
from torch import Tensor

from train import checkpoint
from train.export.__main__ import main
from train.options import ModelOptions

for library in ("open_clip", "timm", "transformers", "onnxruntime", "onnxscript"):
    pytest.importorskip(library)

PICTURES = [
    Image.fromarray(np.random.default_rng(k).integers(0, 256, size, dtype=np.uint8))
    for k, size in enumerate(((50, 70, 3), (32, 32, 3), (61, 40, 3)))
]
CAPTIONS = ["a red cat", "Photo of a Dog, red and blue and red", "", "blue"]  # the second is cut
EXACT = {"rtol": 0.0, "atol": 1e-5}  # another order of the same fp32 sums
SMALL = ModelOptions(
    image_size=16, embed_dim=16, image_widths=(8, 16), text_width=24, text_layers=1, text_heads=2, vocab_size=300
)


def exported(folder: Path, options: ModelOptions, form: str) -> tuple[Path, Tensor, Tensor]:
    """The folder of the export, and the checkpoint's own rows of PICTURES and CAPTIONS."""
    run, out = write_run(folder / "run", options), folder / form
    assert main([str(run), "--to", form, "--out", str(out)]) == 0
    bundle = checkpoint.read_bundle(checkpoint.find(run), compiled=False)
    with torch.no_grad():
        x, y, _ = bundle.module(bundle.prepare(PICTURES, None), bundle.tokenize(CAPTIONS))
    assert float((x[0] - x[1]).abs().max()) > 1e-3 and float((y[0] - y[1]).abs().max()) > 1e-3, "no trivial rows"
    return out, x, y


def scale_of(run: Path) -> float:
    return float(checkpoint.read_bundle(checkpoint.find(run)).module.log_scale.detach())


# open_clip.


@torch.no_grad()
def rows_of_open_clip(model: Any, preprocess: Any, tokenize: Any) -> tuple[Tensor, Tensor]:
    model.eval()
    x = model.encode_image(torch.stack([preprocess(picture) for picture in PICTURES]), normalize=True)
    return x, model.encode_text(tokenize(CAPTIONS), normalize=True)


def test_open_clip_loads_its_folder_and_its_file(tmp_path: Path) -> None:
    import open_clip

    name = register_open_clip(tmp_path / "configs", "ViT-exported")
    out, x, y = exported(tmp_path, ModelOptions(f"open_clip:{name}"), "open_clip")
    for source, weights in ((f"local-dir:{out}", None), (name, str(out / "open_clip_model.safetensors"))):
        model, preprocess = open_clip.create_model_from_pretrained(source, pretrained=weights)
        rows = rows_of_open_clip(model, preprocess, open_clip.get_tokenizer(source))
        for ours, theirs in zip((x, y), rows, strict=True):
            torch.testing.assert_close(theirs, ours, **EXACT)
        assert model.logit_scale.item() == scale_of(tmp_path / "run")


def test_open_clips_folder_holds_the_options_of_the_run(tmp_path: Path) -> None:
    """Whoever loads it gives none."""
    import open_clip

    name = register_open_clip(tmp_path / "configs", "ViT-exported-options")
    options = {
        "embed_dim": 40,
        "init_logit_bias": -10.0,
        "force_quick_gelu": True,
        "force_custom_text": True,
        "image_mean": (0.1, 0.2, 0.3),
        "image_resize_mode": "squash",
        "aug_cfg": {"scale": (0.5, 1.0)},
    }
    towers = ModelOptions(f"open_clip:{name}", options, image_size=48, context_length=6)
    out, x, y = exported(tmp_path, towers, "open_clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    assert x.shape == (3, 40)
    rows = rows_of_open_clip(model, preprocess, open_clip.get_tokenizer(f"local-dir:{out}"))
    for ours, theirs in zip((x, y), rows, strict=True):
        torch.testing.assert_close(theirs, ours, **EXACT)
    assert model.logit_bias.item() == 0.0, "the softmax has none"


def test_open_clips_folder_holds_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    import open_clip

    out, x, y = exported(tmp_path, ModelOptions(write_open_clip(tmp_path / "towers")), "open_clip")
    tokenize = open_clip.get_tokenizer(f"local-dir:{out}")
    assert tokenize(CAPTIONS).shape == (len(CAPTIONS), LENGTH)
    rows = rows_of_open_clip(*open_clip.create_model_from_pretrained(f"local-dir:{out}"), tokenize)
    for ours, theirs in zip((x, y), rows, strict=True):
        torch.testing.assert_close(theirs, ours, **EXACT)


def test_what_open_clip_does_not_load_again_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It makes an image tower of timm's at its own size, whatever the configuration says, and then loads weights."""
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "token"}
    name = register_open_clip(tmp_path / "configs", "timm-exported", **vision, timm_proj="linear", image_size=224)
    run = write_run(tmp_path / "run", ModelOptions(f"open_clip:{name}", image_size=32))
    assert main([str(run), "--to", "open_clip", "--out", str(tmp_path / "out")]) == 1
    assert "its own library does not load what was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "run"]


# transformers.


@pytest.mark.parametrize(("kind", "length"), (("clip", None), ("siglip", 5)))
def test_transformers_loads_its_folder(tmp_path: Path, kind: str, length: int | None) -> None:
    import transformers

    options = replace(hugging_face_kind(tmp_path, kind).options, context_length=length)
    out, x, y = exported(tmp_path, options, "hf")
    model, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    pixels = transformers.AutoImageProcessor.from_pretrained(out)(PICTURES, return_tensors="pt").pixel_values
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert tokens.shape == (len(CAPTIONS), length or LENGTH)
    with torch.no_grad():
        theirs = model(input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(theirs.image_embeds, x, **EXACT)
    torch.testing.assert_close(theirs.text_embeds, y, **EXACT)
    assert model.logit_scale.item() == scale_of(tmp_path / "run")
    if kind == "siglip":
        assert model.logit_bias.item() == 0.0, "the softmax has none"


def test_transformers_processor_reads_pictures_and_captions_from_the_folder(tmp_path: Path) -> None:
    import transformers

    out, x, y = exported(tmp_path, hugging_face_kind(tmp_path, "clip").options, "hf")
    processor = transformers.AutoProcessor.from_pretrained(out)
    inputs = processor(images=PICTURES, text=CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = transformers.CLIPModel.from_pretrained(out)(**inputs)
    torch.testing.assert_close(theirs.image_embeds, x, **EXACT)
    torch.testing.assert_close(theirs.text_embeds, y, **EXACT)


@pytest.mark.parametrize("form", ("hf", "open_clip"))
def test_timm_beside_transformers_has_no_librarys_form(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", timm_kind(tmp_path).options)
    assert main([str(run), "--to", form, "--out", str(tmp_path / "out")]) == 1
    assert "allowed for these: safetensors, onnx" in capsys.readouterr().err


# ONNX: the graphs, and what stands beside them, are enough.

Reader = Callable[[dict[str, Any], Path], tuple[Tensor, Tensor]]


def read_small(described: dict[str, Any], files: Path) -> tuple[Tensor, Tensor]:
    from tokenizers import Tokenizer

    how = described["image"]["preprocessing"]
    padded = [ImageOps.pad(picture, how["size"], Image.Resampling.BICUBIC, color="white") for picture in PICTURES]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in padded])).permute(0, 3, 1, 2) / 255.0
    mean, std = (torch.tensor(how[name])[:, None, None] for name in ("mean", "std"))
    tokenizer = Tokenizer.from_file(str(files / "tokenizer.json"))
    tokenizer.enable_truncation(described["text"]["length"])
    tokenizer.enable_padding(length=described["text"]["length"])
    return (pixels - mean) / std, torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(CAPTIONS)])


def read_open_clip(described: dict[str, Any], files: Path) -> tuple[Tensor, Tensor]:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocess = image_transform_v2(PreprocessCfg(**described["image"]["preprocessing"]), is_train=False)
    tokenize = open_clip.get_tokenizer(f"local-dir:{files}")
    return torch.stack([preprocess(picture) for picture in PICTURES]), tokenize(CAPTIONS)


def tokens_of_transformers(described: dict[str, Any], files: Path) -> Tensor:
    from transformers import AutoTokenizer

    length = described["text"]["length"]
    tokenizer = AutoTokenizer.from_pretrained(files)
    return tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def read_hugging_face(described: dict[str, Any], files: Path) -> tuple[Tensor, Tensor]:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(files)
    assert described["image"]["preprocessing"]["image_mean"] == list(processor.image_mean)
    return processor(PICTURES, return_tensors="pt").pixel_values, tokens_of_transformers(described, files)


def read_timm(described: dict[str, Any], files: Path) -> tuple[Tensor, Tensor]:
    import timm

    transform = timm.data.create_transform(**described["image"]["preprocessing"])
    return torch.stack([transform(picture) for picture in PICTURES]), tokens_of_transformers(described, files)


def run_onnx(path: Path, inputs: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (name,) = [one.name for one in session.get_inputs()]
    at_once = session.run(None, {name: inputs.numpy()})[0]
    one_by_one = [session.run(None, {name: inputs[k : k + 1].numpy()})[0] for k in range(len(inputs))]
    torch.testing.assert_close(torch.from_numpy(np.concatenate(one_by_one)), torch.from_numpy(at_once), **EXACT)
    return torch.from_numpy(at_once)


def check_onnx(folder: Path, options: ModelOptions, read: Reader) -> None:
    out, x, y = exported(folder, options, "onnx")
    described = json.loads((out / "towers.json").read_text())
    images, tokens = read(described, out / "towers")
    assert described["towers"] == options.towers
    assert described["image"]["size"] == list(images.shape[2:]) and described["text"]["length"] == tokens.shape[1]
    assert described["width"] == x.shape[1]
    assert described["logit_scale"] == pytest.approx(np.exp(scale_of(folder / "run")))
    torch.testing.assert_close(run_onnx(out / described["image"]["file"], images), x, **EXACT)
    torch.testing.assert_close(run_onnx(out / described["text"]["file"], tokens), y, **EXACT)


def test_onnxruntime_runs_small_towers(tmp_path: Path) -> None:
    """Of a run that compiled them, with gradient checkpointing."""
    check_onnx(tmp_path, replace(SMALL, gradient_checkpointing=True, compile=True), read_small)


def test_onnxruntime_runs_every_kind_of_towers(tmp_path: Path, kind: Kind) -> None:
    towers = kind.options.towers
    readers: Sequence[tuple[str, Reader]] = (
        ("open_clip:", read_open_clip),
        ("hf:", read_hugging_face),
        ("timm:", read_timm),
    )
    (read,) = [reader for prefix, reader in readers if towers.startswith(prefix)]
    check_onnx(tmp_path, kind.options, read)
