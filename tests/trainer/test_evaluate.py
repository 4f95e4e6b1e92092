"""Evaluation: retrieval, zero-shot classification and a linear probe, the held-out data that they read, and shares."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.data import GROUPS, sample, shard_of, tiny
from helpers.ranks import Pool
from helpers.saved_runs import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from train import towers
from train.config import Config
from train.data import DataError, decode
from train.data.shards import write_shard
from train.evaluate import SetResult, embed, evaluate_towers, ranking, report, sets
from train.evaluate.__main__ import main
from train.evaluate.embed import embed_images
from train.evaluate.ranking import expected_hits
from train.evaluate.records import read_records
from train.evaluate.retrieval import DEPTHS, retrieve
from train.evaluate.sets import read_classes, read_evaluation
from train.evaluate.shares import ALONE
from train.evaluate.zero_shot import Classifier, build_classifier, classify
from train.options import DataOptions
from train.towers import Bundle
from train.towers.contrastive import Contrastive
from train.world import World

RANKS = 4


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
    read = (evaluation_set.source.read(int(index)) for index in evaluation_set.records)
    return [np.asarray(decode(record.image, 1 << 20)).tobytes() for record in read]


# --- What is measured


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
    result = evaluate_towers(bundle_of(x, y, pictures_of(evaluation.sets["heldout"])), evaluation, options, ALONE)
    result = result["heldout"]

    order = (x @ y.T).argsort(1, descending=True)
    orders = (y @ x.T).argsort(1, descending=True)
    for depth in DEPTHS:
        right = [concepts[i] in order[i, :depth] for i in range(40)]
        assert result.image_to_text.recall[depth] == pytest.approx(np.mean(right))
        right = [any(concepts[i] == j for i in orders[j, :depth]) for j in range(25)]
        assert result.text_to_image.recall[depth] == pytest.approx(np.mean(right))
        assert result.image_to_text.chance[depth] == pytest.approx(depth / 25)
    assert result.text_to_image.chance[1] == pytest.approx(40 / 25 / 40)
    assert (result.images, result.texts) == (40, 25)
    means = torch.stack([y[group::4].mean(0) / y[group::4].mean(0).norm() for group in range(4)])
    hits = np.array([(means @ row).argmax() == concept % 4 for row, concept in zip(x, concepts, strict=True)])
    found = result.zero_shot
    assert found is not None
    assert found.acc1 == pytest.approx(hits.mean())
    assert found.acc5 is None, "of four classes"
    assert found.mean_per_class_recall == pytest.approx(np.mean([hits[concepts % 4 == k].mean() for k in range(4)]))
    assert found.majority == pytest.approx((np.bincount(concepts % 4).max() / 40).item())


def test_zero_shot_is_of_pictures_whose_class_is_known() -> None:
    centers, names = torch.eye(6), ("a", "b", "c", "d", "e", "f")
    x = torch.tensor([[6.0, 5, 4, 3, 2, 1], [5.0, 6, 4, 3, 2, 1], [5.0, 6, 4, 3, 2, 1], [1.0, 0, 0, 0, 0, 0]])
    found = classify(x, ("f", "a", "b", "who?"), Classifier(names, centers), ALONE)
    assert found is not None
    assert (found.images.tolist(), found.classes) == ([0, 1, 2], 6)
    assert (found.acc1, found.acc5, found.majority) == pytest.approx((1 / 3, 2 / 3, 1 / 3))
    tied = classify(torch.ones(4, 6), ("a", "a", "b", None), Classifier(names, centers), ALONE)
    assert tied is not None
    assert (tied.acc1, tied.acc5, tied.mean_per_class_recall) == pytest.approx((1 / 6, 5 / 6, 1 / 6))
    assert classify(x, (None, "x", "y", "z"), Classifier(names, centers), ALONE) is None


def test_a_class_is_the_mean_of_its_texts_in_all_templates() -> None:
    seen: list[str] = []

    def tokenize(texts: Sequence[str]) -> torch.Tensor:
        seen.extend(texts)
        return torch.arange(len(texts))[:, None]

    y = torch.nn.functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    bundle = replace(bundle_of(y, y, []), tokenize=tokenize)
    found = build_classifier(bundle, {"cat": ["cat", "kitten"], "dog": ["dog"]}, ("a {}", "a {} in {braces}"), ALONE)
    assert seen == [f"a {text}{end}" for text in ("cat", "kitten", "dog") for end in ("", " in {braces}")]
    assert found.names == ("cat", "dog")
    expected = torch.stack([y[:4].mean(0), y[4:].mean(0)])
    torch.testing.assert_close(found.centers, torch.nn.functional.normalize(expected, dim=1))


def test_a_linear_probe_is_trained_on_one_set_and_measured_on_others(data: Path) -> None:
    vendor, heldout = (str(shard_of(data, split)) for split in ("vendor", "heldout"))
    options = DataOptions(evaluate={"heldout": heldout}, probe=vendor)
    evaluation = replace(read_evaluation(options), classes={})
    assert evaluation.probe is not None
    concepts = torch.arange(40)
    x = torch.nn.functional.one_hot(concepts % 4, 6) + concepts[:, None] / 1000  # by class, of both sets
    both = pictures_of(evaluation.sets["heldout"]) + pictures_of(evaluation.probe)
    result = evaluate_towers(bundle_of(x.repeat(2, 1), torch.ones(40, 6), both), evaluation, options, ALONE)["heldout"]
    assert (result.probe.acc1, result.probe.chance, result.zero_shot) == (1.0, 1 / 4, None)
    entry = report.entries("heldout", result)[-1]
    assert (entry["task"], entry["metrics"]) == ("linear_probe", {"lp_acc1": 1.0, "lp_mean_per_class_recall": 1.0})
    assert "| 100.0 / 100.0 | 25.0 | 25.0 |" in report.table({"heldout": result})
    assert "linear probe" not in report.table({"heldout": replace(result, probe=None)})


def test_results_are_under_the_keys_of_clip_benchmark() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.randn(12, 4)
    both = torch.stack([torch.arange(12)] * 2, 1)
    named = [f"class {k % 6}" for k in range(12)]
    zero_shot = classify(x, named, Classifier(tuple(sorted(set(named))), torch.randn(6, 4)), ALONE)
    images, texts = retrieve(x, y, both, ALONE)
    result = SetResult(12, 12, images, texts, zero_shot, None, np.arange(12), np.arange(12, 24))
    retrieval, classification = report.entries("mine", result)
    assert {retrieval["dataset"], classification["dataset"]} == {"mine"}
    assert retrieval["task"] == "zeroshot_retrieval" and classification["task"] == "zeroshot_classification"
    assert retrieval["metrics"] == {  # what is retrieved gives the name
        **{f"image_retrieval_recall@{k}": texts.recall[k] for k in (1, 5, 10)},
        **{f"text_retrieval_recall@{k}": images.recall[k] for k in (1, 5, 10)},
    }
    assert images.recall != texts.recall
    assert zero_shot is not None
    assert classification["metrics"] == {
        key: getattr(zero_shot, key) for key in ("acc1", "acc5", "mean_per_class_recall")
    }
    assert classification["chance"] == pytest.approx({"acc1": 1 / 6, "acc5": 5 / 6, "mean_per_class_recall": 1 / 6})
    records = report.records({"mine": result})
    figures = {f"mine/{name}": one for name, one in (retrieval["metrics"] | classification["metrics"]).items()}
    assert records.keys() == figures.keys() - {"mine/mean_per_class_recall"}, "which is no mean over pictures"
    assert {name: one.hits.mean() for name, one in records.items()} == pytest.approx(
        {name: figures[name] for name in records}
    )
    assert records["mine/image_retrieval_recall@5"].labels.tolist() == list(range(12, 24)), "texts are the queries"
    assert (
        records["mine/text_retrieval_recall@5"].labels.tolist()
        == list(range(12))
        == records["mine/acc1"].labels.tolist()
    )


# --- Ties and blocks


@settings(deadline=None)  # a busy machine is no fault
@given(better=st.integers(0, 6), wrong=st.integers(0, 5), right=st.integers(1, 4))
def test_ties_are_the_mean_over_all_orders(better: int, wrong: int, right: int) -> None:
    firsts = [min(places) for places in itertools.combinations(range(wrong + right), right)]  # each equally likely
    depths = (1, 2, 5, 10, 30)
    found = expected_hits(*(torch.tensor([count]) for count in (better, wrong, right)), depths)
    assert found[0].tolist() == pytest.approx(
        [np.mean([better + first < depth for first in firsts]) for depth in depths]
    )


def test_retrieval_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, y, text_of = torch.randn(37, 4), torch.randn(11, 4), torch.randint(0, 9, (37,))  # nobody shows two of the texts
    shows = torch.stack([torch.arange(37), text_of], 1)[torch.randperm(37)]
    whole = retrieve(x, y, shows, ALONE)
    monkeypatch.setattr(ranking, "BLOCK", 5)
    assert retrieve(x, y, shows, ALONE) == whole
    assert whole[1].recall[10] < 1.0
    best = (y @ x.T).argmax(1)
    shown = text_of.unique()
    assert whole[1].recall[1] == pytest.approx((text_of[best[shown]] == shown).double().mean().item())


def test_a_collapsed_model_is_as_good_as_a_guess() -> None:
    shows = torch.stack([torch.arange(40), torch.arange(40) % 20], 1)
    for way in retrieve(torch.ones(40, 3), torch.ones(20, 3), shows, ALONE):
        assert way.recall == pytest.approx(way.chance)
        assert way.chance[1] == pytest.approx(0.05)
    for way in retrieve(torch.full((40, 3), torch.nan), torch.ones(20, 3), shows, ALONE):
        assert set(way.recall.values()) == {0.0}, "NaN finds nothing"


def test_an_image_is_right_with_any_of_its_captions() -> None:
    y = torch.eye(5)
    shows = torch.tensor(
        [[0, 0], [0, 1], [1, 1], [1, 2], [2, 3]]
    )  # the second text is of two images; the fifth of none
    x = torch.stack([y[1], y[0], y[4]])
    images, texts = retrieve(x, y, shows, ALONE)
    assert images.recall[1] == pytest.approx((1 + 0 + 0) / 3)
    assert images.chance[1] == pytest.approx((2 + 2 + 1) / 3 / 5)
    assert texts.recall[1] == pytest.approx((0 + 1 + 1 / 3 + 1 / 3) / 4), "ties are thirds"


# --- Shares


def in_small_parts(monkeypatch: Any) -> None:
    """Nine pictures and texts at a time, so that each of several ranks has some."""
    for module, name in ((embed, "CHUNK"), (sets, "CHUNK"), (ranking, "BLOCK")):
        monkeypatch.setattr(module, name, 9)


def figures(group: Any, sections: dict[str, Any], files: dict[str, bytes]) -> tuple[dict[str, SetResult], bytes]:
    """What a rank finds, and the bytes of the rows that it is found from."""
    world = World(dist.get_rank(group), dist.get_world_size(group), torch.device("cpu"), group)
    with pytest.MonkeyPatch.context() as patch:
        in_small_parts(patch)
        config = Config.from_dict(sections)
        torch.manual_seed(1)
        bundle = towers.build(config.model, tuple, files=files)
        bundle.module.eval()
        evaluation = read_evaluation(config.data, world)
        results = evaluate_towers(bundle, evaluation, config.data, world)
        rows, _ = embed_images(bundle, evaluation.sets["twice"], config.data, world)
    return results, rows.numpy().tobytes()


def test_any_number_of_ranks_gives_the_same_figures(
    pool: Pool, data: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    """To the last bit, with ties, bad pictures and pictures that share texts."""
    samples = [sample("heldout", concept, "v") for concept in range(30)]
    for concept, (_, one) in enumerate(samples):  # one picture shows several things
        one["png"] = samples[concept // 6][1]["png"]
    samples[5][1]["png"] = b"no picture"
    for _, one in samples[:2]:
        one["json"] = json.dumps({"captions": ["thing 1", "thing 2"], "class": "animals"}).encode()
    write_shard(tmp_path / "twice.tar", samples)
    sections = tiny(data)
    sections["data"]["evaluate"]["twice"] = str(tmp_path / "twice.tar")
    found = {ranks: pool.run(figures, sections, files, ranks=ranks) for ranks in (1, 2, 4)}
    alone, rows = found[1][0]
    assert {len(every) for every in found.values()} == {1, 2, 4}
    for every in found.values():
        for one, its_rows in every:
            assert one == alone
            assert its_rows == rows
    twice = alone["twice"]
    assert twice.images == 29 and twice.zero_shot is not None, "one of 30 is bad"
    assert ((twice.text_to_image.hits > 0.1) & (twice.text_to_image.hits < 0.9)).any(), "ties, which count in part"
    # Where not every record has a label, a picture has a number of its own, and a text that of the first one with it.
    texts = read_evaluation(Config.from_dict(sections).data).sets["twice"].texts
    assert twice.image_labels.tolist() == [*range(29)]
    assert twice.text_labels[texts.index("thing 20")] == 19, "after a bad one"


def broken(group: Any, options: DataOptions) -> str:
    world = World(dist.get_rank(group), dist.get_world_size(group), torch.device("cpu"), group)
    try:
        read_evaluation(options, world)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_is_wrong_with_held_out_data_is_said_by_one_rank(pool: Pool, tmp_path: Path) -> None:
    samples = [sample("heldout", concept, "v") for concept in range(10)]
    for _, one in samples[:5]:
        one["png"] = b"no picture"
    write_shard(tmp_path / "bad.tar", samples)
    said = pool.run(broken, DataOptions(evaluate={"mine": str(tmp_path / "bad.tar")}), ranks=2)
    assert said[0].startswith("DataError: data.evaluate.mine: of 10 records 5 (not_an_image 5) are bad")
    assert said[1].startswith("ElsewhereError: rank 0: data.evaluate.mine: ")


# --- Data


def test_all_captions_of_records_without_labels_are_texts(tmp_path: Path) -> None:
    samples = [sample("heldout", concept, vendor) for concept in range(3) for vendor in ("a", "b")]
    for index, (_, files) in enumerate(samples):
        files["txt"] = f"thing {index}".encode()
        files["json"] = json.dumps({"captions": [f"thing {index}", "a thing", "a thing"]}).encode()
    write_shard(tmp_path / "x.tar", samples)
    pairs = read_evaluation(DataOptions(evaluate={"mine": str(tmp_path / "x.tar")})).sets["mine"]
    assert pairs.texts == ("a thing", *(f"thing {index}" for index in range(6)))
    assert sorted(map(tuple, pairs.shows.tolist())) == sorted([(k, text) for k in range(6) for text in (0, k + 1)])


def test_records_without_labels_share_a_text_where_their_captions_are_the_same(tmp_path: Path) -> None:
    samples = [sample("heldout", concept, vendor) for concept in range(3) for vendor in ("a", "b")]
    for _, files in samples:
        del files["json"]
    write_shard(tmp_path / "x.tar", samples)
    options = DataOptions(evaluate={"mine": str(tmp_path / "x.tar")})
    pairs = read_evaluation(options).sets["mine"]
    assert pairs.texts == ("thing 0", "thing 1", "thing 2")
    assert pairs.shows.tolist() == [[0, 0], [1, 0], [2, 1], [3, 1], [4, 2], [5, 2]]
    assert set(pairs.class_names) == {None}


def test_classes_that_nobody_describes_are_those_that_records_name(data: Path) -> None:
    options = Config.from_dict(tiny(data)).data
    assert read_evaluation(replace(options, classes=None)).classes == {name: [name] for name in sorted(GROUPS)}


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
    assert {name for one in found.sets.values() for name in one.class_names} == set(GROUPS)

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
    write_shard(tmp_path / "few.tar", samples[:1])
    with pytest.raises(DataError, match=r"data\.probe holds 1 records of 1 classes, too few"):
        read_evaluation(replace(options, probe=str(tmp_path / "few.tar")))


# --- The command


def test_evaluate_takes_other_data_than_the_runs(
    data: Path, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    write_checkpoint(run, data, files, 8)
    assert main([str(run), f"data.evaluate={{mine: {shard_of(data, 'concepts')}}}", "--folder", str(other)]) == 0
    assert "| mine | 10 | 10 |" in capsys.readouterr().out
    written = json.loads((other / report.FIGURES).read_text())
    assert {one["dataset"] for one in written["results"]} == {"mine"}
    assert (written["towers"], written["checkpoint"]) == ("small", "step-000008")
    assert read_records(other).keys() == {
        f"mine/{name}" for one in written["results"] for name in one["metrics"] if not name.startswith("mean")
    }
    assert not (run / report.FIGURES).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["RUN", "model.embed_dim=8"], "'model.embed_dim=8' with a RUN; allowed: options of section data"),
        (["RUN", "--config", "a.yaml"], "--config goes without a RUN"),
        (["RUN", "data.evaluate={}"], "has no data.evaluate; add data.evaluate.NAME=SOURCE"),
        (["data.evaluate.a=b"], "model.towers='small' has no weights but a run's; give a RUN, or model.towers of a"),
        (["model.towers=open_clip:x"], "data.evaluate is empty; add data.evaluate.NAME=SOURCE"),
        (["nothing"], "no whole checkpoint (found: none)"),
    ),
)
def test_evaluate_says_what_it_cannot_do(
    data: Path,
    files: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    if "RUN" in arguments:
        write_checkpoint(tmp_path / "run", data, files, 8)
    assert main([str(tmp_path / "run") if one == "RUN" else one for one in arguments]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1
    assert not said.out


def test_evaluate_takes_a_number_of_processes_from_one_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--processes", "0"])
    assert "--processes 0: allowed: 1 or more" in capsys.readouterr().err
