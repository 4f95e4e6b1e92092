"""Evaluation beside open_clip's own code: of the same weights, pictures, texts and templates, the same figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import make_pairs, write_folder
from helpers.libraries import register_open_clip
from safetensors.torch import save_file
from torch import Tensor

from train.data import decode, open_source
from train.evaluate import report
from train.evaluate.__main__ import main
from train.evaluate.retrieval import DEPTHS
from train.options import DataOptions

open_clip = pytest.importorskip("open_clip")
open_clip_train = pytest.importorskip("open_clip_train")

CLASSES = ("cat", "crow", "dog", "old house", "red apple", "tree")
TEMPLATES = ("a photo of a {}.", "{}", "a {} in the rain")


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    """Pictures with a caption each, and pictures in the folders of their classes."""
    pairs = make_pairs(72)
    for number, pair in enumerate(pairs[40:]):
        folder = tmp_path / "classes" / CLASSES[number % 6]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{pair.stem}.jpg").write_bytes(pair.image)
    return {"captions": str(write_folder(tmp_path / "captions", pairs[:40])), "classes": str(tmp_path / "classes")}


def embedded(model: Any, prepare: Any, tokenizer: Any, source: str) -> tuple[Tensor, Tensor, list[int]]:
    """Images, texts and labels as open_clip alone has them."""
    opened = open_source(source, DataOptions())
    records = [opened.read(number) for number in range(len(opened))]
    images = torch.stack([prepare(decode(record.image, 1 << 20)) for record in records])
    tokens = tokenizer([record.captions[0] for record in records])
    with torch.no_grad():
        x, y = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    return x, y, [record.label or 0 for record in records]


def test_retrieval_and_zero_shot_equal_open_clips(
    sets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from open_clip_train.train import get_clip_metrics

    name = register_open_clip(tmp_path / "models", "ViT-tiny-evaluated")
    torch.manual_seed(3)
    model, _, prepare = open_clip.create_model_and_transforms(name)
    model.eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")

    data = [f"data.evaluate.{one}={source}" for one, source in sets.items()]
    towers = f"model.towers=open_clip:{name}:{tmp_path / 'weights.safetensors'}"
    assert main([towers, *data, f"data.templates={json.dumps(TEMPLATES)}", "--folder", str(tmp_path / "out")]) == 0
    assert "| captions | 40 | 40 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / report.FIGURES).read_text())
    assert written["checkpoint"] is None
    found = {(one["dataset"], one["task"]): one["metrics"] for one in written["results"]}
    assert set(found) == {
        ("captions", "zeroshot_retrieval"),
        ("classes", "zeroshot_retrieval"),
        ("classes", "zeroshot_classification"),
    }

    tokenizer = open_clip.get_tokenizer(name)
    x, y, _ = embedded(model, prepare, tokenizer, sets["captions"])
    expected = get_clip_metrics(x, y, 1.0)
    for depth in DEPTHS:
        recalls = found["captions", "zeroshot_retrieval"]
        assert recalls[f"text_retrieval_recall@{depth}"] == pytest.approx(expected[f"image_to_text_R@{depth}"])
        assert recalls[f"image_retrieval_recall@{depth}"] == pytest.approx(expected[f"text_to_image_R@{depth}"])

    x, _, labels = embedded(model, prepare, tokenizer, sets["classes"])
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, TEMPLATES)
    # As open_clip_train.zero_shot.accuracy, which numpy 2.4 ends with a TypeError (3.3.0).
    correct = (x @ classifier).topk(5).indices == torch.tensor(labels)[:, None]
    top1, top5 = (float(correct[:, :depth].sum()) / len(x) for depth in (1, 5))
    shares = found["classes", "zeroshot_classification"]
    assert (shares["acc1"], shares["acc5"]) == pytest.approx((top1, top5))
    assert 0 < top1 < top5 < 1
    gaps = (x @ classifier).sort(1).values.diff(dim=1)
    assert gaps.min() > 1e-6, "no ties within rounding, where open_clip takes them as they come"
