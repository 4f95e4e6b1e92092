"""The trainer, without processes of its own: configuration, schedules, batches, evaluation, what `auto` means.
See test_train_command_line.py for what may be asked for, test_train_checkpoints.py for checkpoints, and
test_train_runs.py, test_train_stops.py and test_train_failures.py for whole jobs."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from train_data import CONCEPTS, tiny

from softclip_kernels import backends
from train import choices, evaluate, logs
from train.config import Config, ConfigError, Loss, Optimizer, load
from train.data import DataError, Pairs, load_pairs
from train.data.manifest import read_manifest, write_manifest
from train.model import Clip
from train.samples import Batch, Sampler, all_captions
from train.tokenizer import PAD_ID, encode, train_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs(data: Path) -> Pairs:
    return load_pairs(data, "train")


@pytest.fixture(scope="module")
def tokenizer(pairs: Pairs) -> Tokenizer:
    return train_tokenizer(all_captions(pairs), 300)


# -------------------------------------------------------------------------------------------------------- configuration


def test_default_configuration_round_trips(tmp_path: Path) -> None:
    config = load()
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load(tmp_path / "again.yaml") == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_are_typed_as_the_option_is() -> None:
    config = load(
        None, ["optimizer.lr=2e-3", "optimizer.weight_decay=0", "model.image_widths=[8, 16]", "data.folder=a"]
    )
    assert config.optimizer.lr == 2e-3  # YAML reads 2e-3 as text
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.model.image_widths == (8, 16)
    assert load(None, ["data.folder=null"]).data.folder is None


@pytest.mark.parametrize(
    ("override", "message"),
    (
        (
            "optimizer.learning_rate=1",
            r"unknown option of 'optimizer': learning_rate; allowed: batch_size, betas, .*lr",
        ),
        ("optimiser.lr=1", r"unknown section: optimiser; allowed: data, job, loss, model, optimizer"),
        ("optimizer.steps=many", r"optimizer\.steps='many' is str; allowed: int"),
        ("optimizer.steps=1.5", r"optimizer\.steps=1\.5 is float; allowed: int"),
        ("optimizer.steps=0", r"optimizer\.steps=0; allowed: 1 or more"),
        ("optimizer.lr=nan", r"optimizer\.lr=nan; allowed: 0\.0 to 1\.0"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas=\[0\.9\]: two numbers"),
        ("loss.target=siglip", r"loss\.target='siglip'; allowed: 'psd', 'hard'"),
        ("loss.backend=foo", r"loss\.backend='foo'; allowed: 'auto', .*'chunked'"),
        ("loss.alpha_end=1.1", r"loss\.alpha_end=1\.1; allowed: 0\.0 to 1\.0"),
        ("job.zero_stage=0", r"job\.zero_stage=0; allowed: 1, 2, 3"),
        ("job.seed=true", r"job\.seed=True is bool; allowed: int"),
        ("model.text_heads=5", r"model\.text_width=192 must be a multiple of model\.text_heads=5"),
        ("steps=3", r"'steps=3': write section\.name=value"),
        ("job.seed=[", r"'job\.seed=\[': the value is not YAML"),
    ),
)
def test_bad_options_are_named_with_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


@pytest.mark.parametrize("text", ("[1, 2]", "model: 3", "a: [", None))
def test_bad_files(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml|section 'model' is 3"):
        load(file)


def test_schedules_in_closed_form() -> None:
    options = Optimizer(steps=110, warmup_steps=10, lr=1.0, final_lr_fraction=0.1)
    assert [options.lr_at(step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert options.lr_at(10) == 1.0
    assert options.lr_at(60) == pytest.approx(0.55)
    assert options.lr_at(110) == pytest.approx(0.1)
    loss = Loss(hard_steps=10, rise_steps=20, alpha_start=0.1, alpha_end=0.5)
    values = [loss.alpha()(step) for step in (0, 9, 10, 20, 30, 500)]
    assert values == pytest.approx([0.0, 0.0, 0.1, 0.3, 0.5, 0.5])
    assert replace(loss, schedule="linear").alpha()(15) == pytest.approx(0.2)
    assert replace(loss, schedule="constant").alpha()(10) == 0.5
    assert replace(loss, target="hard").alpha()(30) == 0.0


# -------------------------------------------------------------------------------------------------------------- batches


def joined(shares: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([one.images for one in shares]), torch.cat([one.tokens for one in shares])


def test_a_batch_does_not_depend_on_the_number_of_ranks(pairs: Pairs, tokenizer: Tokenizer) -> None:
    sampler = Sampler(pairs, tokenizer, 12, 24, seed=3)
    whole = joined([sampler.share(5, 0, 1, CPU)])
    for ranks in (2, 3, 4):
        cut = joined([sampler.share(5, rank, ranks, CPU) for rank in range(ranks)])
        assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))
    again = Sampler(pairs, tokenizer, 12, 24, seed=3).share(5, 0, 1, CPU)
    assert torch.equal(again.images, whole[0])
    assert again.keys == sampler.share(5, 1, 2, CPU).keys
    assert not torch.equal(sampler.share(6, 0, 1, CPU).images, whole[0])
    assert not torch.equal(Sampler(pairs, tokenizer, 12, 24, seed=4).share(5, 0, 1, CPU).images, whole[0])


def test_a_batch_takes_each_concept_once_and_reaches_every_drawing(pairs: Pairs, tokenizer: Tokenizer) -> None:
    concept_of = dict(zip(pairs.keys, pairs.concepts.tolist(), strict=True))
    sampler = Sampler(pairs, tokenizer, 12, CONCEPTS, seed=0)
    drawn: set[str] = set()
    for step in range(12):  # each of the two drawings of a concept is missed with a chance of 2^-12
        keys = sampler.share(step, 0, 1, CPU).keys
        assert len({concept_of[key] for key in keys}) == CONCEPTS
        drawn.update(keys)
    assert len(drawn) > 0.95 * len(pairs)
    with pytest.raises(
        ConfigError, match=rf"batch_size={CONCEPTS + 1}; allowed: at most {CONCEPTS}, the number of conc"
    ):
        Sampler(pairs, tokenizer, 12, CONCEPTS + 1, seed=0)


def test_captions_belong_to_their_drawings(pairs: Pairs, tokenizer: Tokenizer) -> None:
    sampler = Sampler(pairs, tokenizer, 12, CONCEPTS, seed=0)
    captions = dict(zip(pairs.keys, pairs.captions, strict=True))
    chosen = set()
    for step in range(3):
        batch = sampler.share(step, 0, 1, CPU)
        for key, tokens in zip(batch.keys, batch.tokens, strict=True):
            allowed = encode(tokenizer, list(captions[key]), 12)
            position = (allowed == tokens).all(1).nonzero().flatten().tolist()
            assert position, f"{key} came with another's caption"
            chosen.update(position)
    assert chosen == {0, 1, 2}, "every caption of a drawing has its turn"


def test_tokens_are_cut_and_padded(tokenizer: Tokenizer) -> None:
    tokens = encode(tokenizer, ["thing 1", "a drawing of thing 1 and of many other things besides"], 8)
    assert tokens.shape == (2, 8)
    assert (tokens[0] == PAD_ID).any()
    assert not (tokens[1] == PAD_ID).any()
    assert encode(tokenizer, ["THING 1"], 8).tolist() == tokens[:1].tolist(), "case is no difference"


def test_padding_does_not_change_an_embedding(data: Path, tokenizer: Tokenizer) -> None:
    model = Clip(Config.from_dict(tiny(data)).model, tokenizer.get_vocab_size()).eval()
    tokens = encode(tokenizer, ["thing 1"], 12)
    length = int((tokens != PAD_ID).sum())
    torch.testing.assert_close(model(None, tokens)[1], model(None, tokens[:, :length])[1])


# ----------------------------------------------------------------------------------------------------- logs, evaluation


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    values = {"loss": 1.0, "alpha": 0.5, "scale": 14.0, "r1_image_to_text": 0.1, "r1_text_to_image": 0.2}
    log = logs.Log(tmp_path, 0, 10)
    for step in range(6):
        log.step(step, values)
    log.row(2, {"heldout_r1_image_to_text": 0.3, "heldout_r1_text_to_image": 0.3})
    log.nonfinite(5, ("a", "b"))
    log.close()
    with (tmp_path / logs.METRICS).open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a line
    resumed = logs.Log(tmp_path, 4, 10)
    resumed.step(4, values | {"loss": math.nan})
    resumed.close()
    rows = logs.read_rows(tmp_path / logs.METRICS)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 2, 4]
    assert rows[-1]["loss"] is None
    assert logs.read_rows(tmp_path / logs.NONFINITE) == []
    assert logs.plot(tmp_path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("terminal", (True, False))
def test_the_progress_bar_fills_no_log_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    clock = iter(range(10_000))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))  # a second passes between two looks at it
    values = dict.fromkeys(logs.BAR, 0.5)
    log = logs.Log(tmp_path, 0, 400)
    for step in range(400):
        log.step(step, values)
    shown = capsys.readouterr().err.count("\r")
    log.close()
    assert shown > 50 if terminal else shown < 20


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


def test_retrieval_and_zero_shot_against_sorting(tokenizer: Tokenizer) -> None:
    generator = np.random.default_rng(0)
    x, y = (torch.from_numpy(generator.normal(size=(n, 3))) for n in (40, 25))
    concepts = torch.cat([torch.arange(25), torch.from_numpy(generator.integers(0, 25, 15))])
    pairs = made_pairs(concepts, concepts % 3, ("a", "b", "c"))
    model = Fixed(x, {f"thing {concept}": y[concept] for concept in range(25)}, tokenizer)
    groups = [[f"thing {concept}" for concept in range(group, 25, 3)] for group in range(3)]
    assert [sorted(one) for one in groups] == evaluate.describe_groups(pairs)
    prototypes = evaluate.prototypes(model, tokenizer, groups)  # type: ignore[arg-type]
    result = evaluate.evaluate_split(model, tokenizer, pairs, prototypes)  # type: ignore[arg-type]
    order = (x @ y.T).argsort(1, descending=True)
    orders = (y @ x.T).argsort(1, descending=True)
    for depth in evaluate.DEPTHS:
        right = [concepts[i] in order[i, :depth] for i in range(40)]
        assert result.image_to_text.recall[depth] == pytest.approx(np.mean(right))
        right = [any(concepts[i] == j for i in orders[j, :depth]) for j in range(25)]
        assert result.text_to_image.recall[depth] == pytest.approx(np.mean(right))
    assert result.image_to_text.chance == pytest.approx(1 / 25)
    assert result.text_to_image.chance == pytest.approx(40 / 25 / 40)
    assert (result.images, result.captions) == (40, 25)
    means = torch.stack([y[group::3].mean(0) / y[group::3].mean(0).norm() for group in range(3)])
    hits = [(means @ row).argmax() == concept % 3 for row, concept in zip(x, concepts, strict=True)]
    assert result.zero_shot == pytest.approx(np.mean(hits))
    assert result.zero_shot_majority == pytest.approx((torch.bincount(concepts % 3).max() / 40).item())


def test_a_group_that_training_never_saw_is_described_by_its_name() -> None:
    pairs = made_pairs(torch.tensor([3, 3]), torch.tensor([1, 1]), ("food-drink", "flags"))
    assert evaluate.describe_groups(pairs) == [["food and drink"], ["thing 3"]]


def test_a_collapsed_model_scores_nothing(tokenizer: Tokenizer, pairs: Pairs) -> None:
    model = Fixed(torch.ones(len(pairs), 3), {texts[0]: torch.ones(3) for texts in pairs.captions}, tokenizer)
    ways = evaluate.retrieve(model, tokenizer, pairs, model.x)  # type: ignore[arg-type]
    assert {recall for way in ways for recall in way.recall.values()} == {0.0}, "ties must not count as hits"


def test_held_out_data_are_checked_before_training(data: Path, tmp_path: Path, pairs: Pairs) -> None:
    config = Config.from_dict(tiny(data))
    assert evaluate.data_folder(config) == data
    found = evaluate.read_data(config, data, pairs)
    assert {name: len(split) for name, split in found.splits.items()} == {"heldout": 40, "vendor": 40, "concepts": 10}
    corrupted = load_pairs(data, "train", corrupt=0.5)
    assert evaluate.describe_groups(corrupted) != found.groups
    assert evaluate.read_data(config, data, corrupted).groups == evaluate.read_data(config, data).groups == found.groups

    manifest = read_manifest(data)
    for path in data.glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    write_manifest(tmp_path, replace(manifest, shards={name: manifest.shards[name] for name in ("train", "heldout")}))
    with pytest.raises(DataError, match="lacks the splits concepts, vendor, which the evaluation needs"):
        evaluate.read_data(config, tmp_path, pairs)
    write_manifest(tmp_path, manifest)
    (tmp_path / "vendor-000000.tar").unlink()
    (tmp_path / "vendor-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match="is not what its manifest describes"):
        evaluate.read_data(config, tmp_path, pairs)
    unchecked = tuple(replace(shard, sha256="") for shard in manifest.shards["vendor"])
    write_manifest(tmp_path, replace(manifest, shards={**manifest.shards, "vendor": unchecked}))
    with pytest.raises(DataError, match="truncated_tar"):
        evaluate.read_data(config, tmp_path, pairs)
    generous = replace(config, data=replace(config.data, max_bad_fraction=1.0))
    with pytest.raises(DataError, match=r"the split 'vendor' .* holds no sample"):
        evaluate.read_data(generous, tmp_path, pairs)


def test_pictures_of_another_size_than_configured_are_refused(data: Path) -> None:
    config = Config.from_dict(tiny(data))
    with pytest.raises(ConfigError, match=r"image_size=48, but .* have 16 pixels a side; set data\.image_size=16"):
        evaluate.data_folder(replace(config, data=replace(config.data, image_size=48)))


# --------------------------------------------------------------------------------------------- what `auto` stands for


@pytest.mark.parametrize(
    ("known", "width"),
    (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True, "avx512_bf16": False}, "bf16"), ({"avx2": True}, "fp32")),
)
def test_automatic_precision_follows_the_instructions(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], width: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert choices.precision("auto", CPU) == width
    assert choices.precision("bf16", CPU) == "bf16"


def test_the_backend_is_chosen_once_and_said_with_what_was_passed_over(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.from_dict(tiny(data))
    names = tuple(backends.registered())
    for name in names[:-1]:
        monkeypatch.setattr(backends.registered()[name], "why_not", lambda problem: "it has a day off", raising=True)
    settled, words = choices.settle(config, 2, CPU)
    assert settled.loss.backend == names[-1]
    assert settled.job.precision in ("bf16", "fp32")
    passed_over = "; ".join(f"{name}: it has a day off" for name in names[:-1])
    assert words == f"{settled.job.precision} (auto), backend {names[-1]} ({passed_over})"
    named = replace(config, loss=replace(config.loss, backend=names[-1]), job=replace(config.job, precision="fp32"))
    assert choices.settle(named, 2, CPU) == (named, f"fp32, backend {names[-1]}")
    with pytest.raises(ConfigError, match=rf"loss\.backend='{names[0]}' cannot compute this: it has a day off"):
        choices.settle(replace(config, loss=replace(config.loss, backend=names[0])), 2, CPU)


# --------------------------------------------------------------------------------------------------------- command line


def test_evaluate_names_a_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tmp_path / "nothing")]) == 1
    assert "no whole checkpoint (found: none)" in capsys.readouterr().err


def test_configuration_file_of_the_default_run_names_only_known_options() -> None:
    mapping = yaml.safe_load((Path(evaluate.__file__).parent / "configs" / "emoji.yaml").read_text(encoding="utf-8"))
    Config.from_dict(mapping)


def test_documentation_lists_every_option_with_its_default() -> None:
    text = (Path(evaluate.__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    listed = {line.split(" | ")[0]: line.split(" | ")[1] for line in text.splitlines() if line.startswith("| `")}
    options = {
        f"| `{section}.{name}`": "null" if value is None else str(value)
        for section, values in Config().to_dict().items()
        for name, value in values.items()
    }
    assert listed == options
