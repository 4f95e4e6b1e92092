"""The trainer's options: what a configuration may hold, what is refused, and that its documentation is complete."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from train.config import Config, changes, load
from train.options import ConfigError, DataOptions, LossOptions, OptimizerOptions


def test_the_default_configuration_round_trips(tmp_path: Path) -> None:
    config = load()
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load(tmp_path / "again.yaml") == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_are_typed_as_the_option_is() -> None:
    config = load(None, ["optimizer.lr=2e-3", "optimizer.weight_decay=0", "model.image_widths=[8, 16]", "data.index=a"])
    assert config.optimizer.lr == 2e-3  # YAML reads 2e-3 as text
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.model.image_widths == (8, 16)
    assert load(None, ["data.index=null"]).data.index is None
    assert load(None, ["optimizer.layer_decay=1"]).optimizer.layer_decay == 1.0
    assert load(None, ["model.compile=true"]).model.compile is True
    assert load(None, ["data.evaluate.mine=a b", "data.evaluate.vendor=c"]).data.evaluate == {
        "heldout": "emoji:heldout", "vendor": "c", "concepts": "emoji:concepts", "mine": "a b"
    }  # fmt: skip
    assert load(None, ["model.options.drop=0.1", "deepspeed.zero_optimization.overlap_comm=true"]).deepspeed == {
        "zero_optimization": {"overlap_comm": True}
    }


def test_without_a_file_it_is_the_emoji_run_unless_other_data_are_named(tmp_path: Path) -> None:
    assert load().data.source == "emoji:train"
    assert load().data.evaluate
    assert load(None, ["data.source=pairs"]).data == DataOptions(source="pairs")
    (tmp_path / "mine.yaml").write_text("data: {distinct: label}", encoding="utf-8")
    assert load(tmp_path / "mine.yaml", ["data.source=pairs"]).data == DataOptions(source="pairs", distinct="label")


def test_changes_are_named_by_option_and_the_free_section_as_one() -> None:
    before, after = load(), load(None, ["data.evaluate.vendor=c", "job.seed=1", "deepspeed.a.b=1"])
    assert changes(before, before) == {}
    found = changes(before, after)
    assert list(found) == ["deepspeed", "data.evaluate", "job.seed"]
    assert found["job.seed"] == (0, 1)
    assert found["deepspeed"] == ({}, {"a": {"b": 1}})


@pytest.mark.parametrize(
    ("override", "message"),
    (
        (
            "optimizer.learning_rate=1",
            r"unknown option of 'optimizer': learning_rate; allowed: batch_size, betas, .*lr",
        ),
        ("optimiser.lr=1", r"unknown section: optimiser; allowed: data, deepspeed, job, loss, model, optimizer"),
        ("optimizer.steps=many", r"optimizer\.steps='many' is str; allowed: int"),
        ("optimizer.steps=1.5", r"optimizer\.steps=1\.5 is float; allowed: int"),
        ("optimizer.steps=0", r"optimizer\.steps=0; allowed: 1 or more"),
        ("optimizer.lr=nan", r"optimizer\.lr=nan; allowed: 0\.0 to 1\.0"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas=\[0\.9\]: two numbers"),
        ("loss.target=siglip", r"loss\.target='siglip'; allowed: 'hard', 'psd', 'blend'"),
        ("loss.backend=foo", r"loss\.backend='foo'; allowed: 'auto', .*'chunked'"),
        ("loss.alpha_end=1.1", r"loss\.alpha_end=1\.1; allowed: 0\.0 to 1\.0"),
        ("job.zero_stage=4", r"job\.zero_stage=4; allowed: 0, 1, 2, 3"),
        ("job.offload_parameters=true", r"job\.offload_parameters=true with job\.zero_stage=1; allowed: with 3"),
        ("model.compile=1", r"model\.compile=1 is int; allowed: bool"),
        ("data.evaluate=pairs", r"data\.evaluate='pairs' is str; allowed: dict\[str, str\]"),
        ("data.evaluate.mine=3", r"data\.evaluate\.mine=3 is int; allowed: str"),
        ("data.source.a=3", r"'data\.source\.a=3': 'data\.source' is no section"),
        ("data.source=''", r"data\.source=''; allowed: a path, which is not empty"),
        ("data.weights=[1, 2]", r"data\.weights=\[1\.0, 2\.0\] for 1 sources; allowed: one for each"),
        ("data.folder=a", r"data\.folder is of an earlier version; give data\.source instead"),
        ("optimizer.name=adam-w", r"optimizer\.name='adam-w'; allowed: 'adamw', 'sgd', or 'timm:'"),
        (
            "optimizer.schedule=cooldown",
            r"optimizer\.cooldown_steps=0 with optimizer\.schedule='cooldown'; allowed: 1 to",
        ),
        ("job.seed=true", r"job\.seed=True is bool; allowed: int"),
        ("model.text_heads=5", r"model\.text_width=192 must be a multiple of model\.text_heads=5"),
        ("steps=3", r"'steps=3': write section\.name=value"),
        ("job.seed=[", r"'job\.seed=\[': the value is not YAML"),
    ),
)
def test_bad_options_are_named_with_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


def test_a_run_of_the_former_name_of_a_backend_goes_on_under_its_new_one() -> None:
    with pytest.warns(DeprecationWarning, match="now called 'cpu'"):
        assert load(None, ["loss.backend=native"]).loss.backend == "cpu"


@pytest.mark.parametrize("text", ("[1, 2]", "model: 3", "a: [", None))
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml|section 'model' is 3"):
        load(file)


def test_learning_rate_and_soft_share_equal_their_closed_forms() -> None:
    options = OptimizerOptions(steps=110, warmup_steps=10, lr=1.0, final_lr_fraction=0.1)
    assert [options.lr_at(step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert options.lr_at(10) == 1.0
    assert options.lr_at(60) == pytest.approx(0.55)
    assert options.lr_at(110) == pytest.approx(0.1)
    assert replace(options, schedule="constant").lr_at(109) == 1.0
    cooldown = replace(options, schedule="cooldown", cooldown_steps=20)
    assert [cooldown.lr_at(step) for step in (4, 10, 89, 90, 100, 110)] == pytest.approx([0.5, 1, 1, 1, 0.55, 0.1])
    loss = LossOptions(hard_steps=10, rise_steps=20, alpha_start=0.1, alpha_end=0.5)
    values = [loss.alpha()(step) for step in (0, 9, 10, 20, 30, 500)]
    assert values == pytest.approx([0.0, 0.0, 0.1, 0.3, 0.5, 0.5])
    assert replace(loss, schedule="linear").alpha()(15) == pytest.approx(0.2)
    assert replace(loss, schedule="constant").alpha()(10) == 0.5
    assert replace(loss, target="hard").alpha()(30) == 0.0


def test_the_file_of_the_default_run_names_only_known_options() -> None:
    mapping = yaml.safe_load((ROOT / "train" / "configs" / "emoji.yaml").read_text(encoding="utf-8"))
    Config.from_dict(mapping)


def test_swapped_captions_have_an_earlier_name(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    for corrupt, noise in ((0.0, {}), (0.3, {"swap": 0.3})):
        file.write_text(f"data: {{corrupt: {corrupt}}}")
        assert load(file).data.noise == noise
    assert load(file, ["data.noise={junk: 0.1}"]).data.noise == {"swap": 0.3, "junk": 0.1}


def test_documentation_lists_every_option_with_its_default() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    text = page.partition("\n## Options\n")[2].partition("\n## ")[0]
    listed = {line.split(" | ")[0]: line.split(" | ")[1] for line in text.splitlines() if line.startswith("| `")}
    options = {
        f"| `{section}.{name}`": "null" if value is None else str(value)
        for section, values in Config().to_dict().items()
        for name, value in values.items()
    }
    assert listed == options
