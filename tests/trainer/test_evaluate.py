"""Evaluation: retrieval and zero-shot classification, and the held-out data that they read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import tiny
from tokenizers import Tokenizer

from train.config import Config, ConfigError
from train.data import DataError, Pairs, data_folder, load_pairs, read_held_out
from train.data.manifest import read_manifest, write_manifest
from train.data.run_data import describe_groups
from train.evaluate import evaluate_split
from train.evaluate.__main__ import main
from train.evaluate.retrieval import DEPTHS, retrieve
from train.evaluate.zero_shot import prototypes
from train.tokenizer import encode


class Fixed(torch.nn.Module):
    """Embeddings that are given: the pictures' as they come, and a table of texts', found by their tokens."""

    def __init__(self, x: torch.Tensor, texts: dict[str, torch.Tensor], tokenizer: Tokenizer) -> None:
        super().__init__()
        self.x = x
        self.table = {tuple(encode(tokenizer, [text], 12)[0].tolist()): row for text, row in texts.items()}
        self.text = torch.nn.Module()
        self.text.positions = torch.nn.Parameter(torch.empty(12, 1))

    def forward(self, images: Any, tokens: Any) -> Any:
        if images is not None:
            return self.x, None, None
        return None, torch.stack([self.table[tuple(row)] for row in tokens.tolist()]), None


def made_pairs(concepts: torch.Tensor, groups: torch.Tensor, names: tuple[str, ...]) -> Pairs:
    n = len(concepts)
    return Pairs(
        images=torch.zeros(n, 4, 2, 2, dtype=torch.uint8),
        captions=[(f"thing {concept}",) for concept in concepts.tolist()],
        concepts=concepts,
        groups=groups,
        group_names=names,
        vendors=("v",) * n,
        keys=tuple(map(str, range(n))),
        corrupted=torch.zeros(n, dtype=torch.bool),
        bad={},
    )


def test_retrieval_and_zero_shot_agree_with_sorting(tokenizer: Tokenizer) -> None:
    generator = np.random.default_rng(0)
    x, y = (torch.from_numpy(generator.normal(size=(n, 3))) for n in (40, 25))
    concepts = torch.cat([torch.arange(25), torch.from_numpy(generator.integers(0, 25, 15))])
    pairs = made_pairs(concepts, concepts % 3, ("a", "b", "c"))
    model = Fixed(x, {f"thing {concept}": y[concept] for concept in range(25)}, tokenizer)
    groups = [[f"thing {concept}" for concept in range(group, 25, 3)] for group in range(3)]
    assert [sorted(one) for one in groups] == describe_groups(pairs)
    centers = prototypes(model, tokenizer, groups)  # type: ignore[arg-type]
    result = evaluate_split(model, tokenizer, pairs, centers)  # type: ignore[arg-type]
    order = (x @ y.T).argsort(1, descending=True)
    orders = (y @ x.T).argsort(1, descending=True)
    for depth in DEPTHS:
        right = [concepts[i] in order[i, :depth] for i in range(40)]
        assert result.image_to_text.recall[depth] == pytest.approx(np.mean(right))
        right = [any(concepts[i] == j for i in orders[j, :depth]) for j in range(25)]
        assert result.text_to_image.recall[depth] == pytest.approx(np.mean(right))
    assert result.image_to_text.chance == pytest.approx(1 / 25)
    assert result.text_to_image.chance == pytest.approx(40 / 25 / 40)
    assert (result.images, result.captions) == (40, 25)
    means = torch.stack([y[group::3].mean(0) / y[group::3].mean(0).norm() for group in range(3)])
    hits = [(means @ row).argmax() == concept % 3 for row, concept in zip(x, concepts, strict=True)]
    assert result.zero_shot.accuracy == pytest.approx(np.mean(hits))
    assert result.zero_shot.majority == pytest.approx((torch.bincount(concepts % 3).max() / 40).item())


def test_a_group_that_training_never_saw_is_described_by_its_name() -> None:
    pairs = made_pairs(torch.tensor([3, 3]), torch.tensor([1, 1]), ("food-drink", "flags"))
    assert describe_groups(pairs) == [["food and drink"], ["thing 3"]]


def test_a_collapsed_model_scores_nothing(tokenizer: Tokenizer, pairs: Pairs) -> None:
    model = Fixed(torch.ones(len(pairs), 3), {texts[0]: torch.ones(3) for texts in pairs.captions}, tokenizer)
    ways = retrieve(model, tokenizer, pairs, model.x)  # type: ignore[arg-type]
    assert {recall for way in ways for recall in way.recall.values()} == {0.0}, "ties must not count as hits"


def test_held_out_data_are_checked_before_training(data: Path, tmp_path: Path, pairs: Pairs) -> None:
    config = Config.from_dict(tiny(data))
    assert data_folder(config) == data
    found = read_held_out(config, data, pairs)
    assert {name: len(split) for name, split in found.splits.items()} == {"heldout": 40, "vendor": 40, "concepts": 10}
    corrupted = load_pairs(data, "train", corrupt=0.5)
    assert describe_groups(corrupted) != found.groups
    assert read_held_out(config, data, corrupted).groups == read_held_out(config, data).groups == found.groups

    manifest = read_manifest(data)
    for path in data.glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    write_manifest(tmp_path, replace(manifest, shards={name: manifest.shards[name] for name in ("train", "heldout")}))
    with pytest.raises(DataError, match="lacks the splits concepts, vendor, which the evaluation needs"):
        read_held_out(config, tmp_path, pairs)
    write_manifest(tmp_path, manifest)
    (tmp_path / "vendor-000000.tar").unlink()
    (tmp_path / "vendor-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match="is not what its manifest describes"):
        read_held_out(config, tmp_path, pairs)
    unchecked = tuple(replace(shard, sha256="") for shard in manifest.shards["vendor"])
    write_manifest(tmp_path, replace(manifest, shards={**manifest.shards, "vendor": unchecked}))
    with pytest.raises(DataError, match="truncated_tar"):
        read_held_out(config, tmp_path, pairs)
    generous = replace(config, data=replace(config.data, max_bad_fraction=1.0))
    with pytest.raises(DataError, match=r"the split 'vendor' .* holds no sample"):
        read_held_out(generous, tmp_path, pairs)


def test_pictures_of_another_size_than_configured_are_refused(data: Path) -> None:
    config = Config.from_dict(tiny(data))
    with pytest.raises(ConfigError, match=r"image_size=48, but .* have 16 pixels a side; set data\.image_size=16"):
        data_folder(replace(config, data=replace(config.data, image_size=48)))


def test_evaluate_names_a_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 1
    assert "no whole checkpoint (found: none)" in capsys.readouterr().err
