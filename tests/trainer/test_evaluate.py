"""Evaluation: retrieval and zero-shot classification, and the held-out data that they read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import GROUPS, sample, shard_of, tiny

from train.config import Config
from train.data import DataError
from train.data.shards import write_shard
from train.evaluate import evaluate_set
from train.evaluate.__main__ import main
from train.evaluate.retrieval import DEPTHS, retrieve
from train.evaluate.sets import read_classes, read_evaluation
from train.evaluate.zero_shot import prototypes
from train.options import DataOptions
from train.towers import Bundle
from train.towers.contrastive import Contrastive


class Fixed(Contrastive):
    """Embeddings that are given: a table of pictures', by their first pixel, and one of texts', by their number."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super().__init__()
        self.x, self.y = x, y
        self.log_scale = torch.nn.Parameter(torch.zeros(1))

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.x[images[:, 0, 0, 0].long()]

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.y[tokens[:, 0]]


def bundle_of(x: torch.Tensor, y: torch.Tensor, pictures: list[Any]) -> Bundle:
    """`pictures`: the bytes of those that x is of, in order; a text "thing 7" is number 7 of y."""
    number = {one: index for index, one in enumerate(pictures)}

    def prepare(images: Sequence[Any], seeds: Any) -> torch.Tensor:
        assert seeds is None, "an evaluation augments nothing"
        return torch.tensor([number[np.asarray(one).tobytes()] for one in images], dtype=torch.float32).view(
            -1, 1, 1, 1
        )

    def tokenize(texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[int(text.removeprefix("thing "))] for text in texts])

    return Bundle(Fixed(x, y), prepare, tokenize, x.shape[1], 1, lambda *_: [])


def pictures_of(evaluation_set: Any) -> list[bytes]:
    from train.data import decode

    read = (evaluation_set.source.read(int(index)) for index in evaluation_set.records)
    return [np.asarray(decode(record.image, 1 << 20)).tobytes() for record in read]


def test_retrieval_and_zero_shot_agree_with_sorting(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x, y = (torch.nn.functional.normalize(torch.from_numpy(generator.normal(size=(n, 3))).float()) for n in (40, 25))
    concepts = np.concatenate([np.arange(25), generator.integers(0, 25, 15)])
    samples = [sample("heldout", int(concept), f"v{index}") for index, concept in enumerate(concepts)]
    write_shard(shard_of(tmp_path, "heldout"), samples)
    classes = {group: [f"thing {one}" for one in range(index, 25, 4)] for index, group in enumerate(GROUPS)}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    options = DataOptions(
        evaluate={"heldout": str(shard_of(tmp_path, "heldout"))}, classes=str(tmp_path / "classes.json")
    )
    evaluation = read_evaluation(options)
    pairs = evaluation.sets["heldout"]
    bundle = bundle_of(x, y, pictures_of(pairs))
    centers = prototypes(bundle, evaluation.classes.values())
    result = evaluate_set(bundle, pairs, options, centers)

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
    means = torch.stack([y[group::4].mean(0) / y[group::4].mean(0).norm() for group in range(4)])
    hits = [(means @ row).argmax() == concept % 4 for row, concept in zip(x, concepts, strict=True)]
    assert result.zero_shot is not None
    assert result.zero_shot.accuracy == pytest.approx(np.mean(hits))
    assert result.zero_shot.majority == pytest.approx((np.bincount(concepts % 4).max() / 40).item())


def test_retrieval_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, y, text_of = torch.randn(37, 4), torch.randn(11, 4), torch.randint(0, 9, (37,))  # nobody shows two of the texts
    whole = retrieve(x, y, text_of)
    monkeypatch.setattr("train.evaluate.retrieval.BLOCK", 5)
    cut = retrieve(x, y, text_of)
    assert [one.recall for one in cut] == [one.recall for one in whole]
    assert [one.chance for one in cut] == pytest.approx([one.chance for one in whole])
    assert whole[1].recall[10] < 1.0
    best = (y @ x.T).argmax(1)
    shown = text_of.unique()
    assert whole[1].recall[1] == pytest.approx((text_of[best[shown]] == shown).double().mean().item())


def test_a_collapsed_model_scores_nothing() -> None:
    ways = retrieve(torch.ones(40, 3), torch.ones(20, 3), torch.arange(40) % 20)
    assert {recall for way in ways for recall in way.recall.values()} == {0.0}, "ties must not count as hits"


def test_records_without_labels_share_a_text_where_their_captions_are_the_same(tmp_path: Path) -> None:
    samples = [sample("heldout", concept, vendor) for concept in range(3) for vendor in ("a", "b")]
    for _, files in samples:
        del files["json"]
    write_shard(tmp_path / "x.tar", samples)
    options = DataOptions(evaluate={"mine": str(tmp_path / "x.tar")})
    pairs = read_evaluation(options).sets["mine"]
    assert pairs.texts == ("thing 0", "thing 1", "thing 2")
    assert pairs.text_of.tolist() == [0, 0, 1, 1, 2, 2]
    assert pairs.class_of is None


def test_a_class_without_texts_is_described_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text('{"food and drink": [], "flags": ["thing 3"]}')
    assert read_classes(str(file), 0) == {"food and drink": ["food and drink"], "flags": ["thing 3"]}
    for text in ("[]", '{"one": []}', '{"a": "b", "c": []}', '{"a": [1], "c": []}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"data\.classes='.*classes.json'; allowed: a JSON object of at least two"):
            read_classes(str(file), 0)
    file.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_classes(str(file), 0)


def test_held_out_data_are_checked_before_training(data: Path, tmp_path: Path) -> None:
    options = Config.from_dict(tiny(data)).data
    found = read_evaluation(options)
    assert {name: len(one) for name, one in found.sets.items()} == {"heldout": 40, "vendor": 40, "concepts": 10}
    assert all(one.class_of is not None for one in found.sets.values())

    samples = [sample("heldout", concept, "v") for concept in range(10)]
    samples[3][1]["png"] = samples[3][1]["png"][:100]
    write_shard(tmp_path / "bad.tar", samples)
    bad = replace(options, evaluate={"mine": str(tmp_path / "bad.tar")}, max_bad_fraction=0.1)
    pairs = read_evaluation(bad).sets["mine"]
    assert (len(pairs), pairs.left_out) == (9, {"broken_image": 1})
    with pytest.raises(DataError, match=r"data\.evaluate\.mine: of 10 records 1 \(broken_image 1\) are bad"):
        read_evaluation(replace(bad, max_bad_fraction=0.09))
    with pytest.raises(DataError, match=r"none\.tar"):
        read_evaluation(replace(bad, evaluate={"mine": str(tmp_path / "none.tar")}))


def test_evaluate_names_a_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 1
    assert "no whole checkpoint (found: none)" in capsys.readouterr().err
