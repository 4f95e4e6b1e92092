"""A study's file: which runs it asks for, and what it may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT

from train.config import Config, ConfigError, load
from train.study.plan import read_study

SMALL: dict[str, Any] = {
    "base": {"optimizer": {"steps": 40}},
    "seeds": [3, 1],
    "conditions": {"clean": {}, "noisy": {"data.noise": {"swap": 0.4}, "runs": ["hard"]}},
    "runs": {"hard": {"loss.target": "hard"}, "psd": None},
    "reference": "hard",
    "primary": "heldout/acc1",
}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return file


def test_every_method_meets_every_condition_that_takes_it_seed_by_seed(tmp_path: Path) -> None:
    runs = read_study(write(tmp_path)).runs
    names = ["clean/hard", "clean/psd", "noisy/hard"]
    assert [run.name for run in runs] == [f"{name}/seed-{seed}" for seed in (3, 1) for name in names]
    made = {run.name: run.config for run in runs}["noisy/hard/seed-3"]
    job = {"processes": 1, "threads": 1, "seed": 3}
    data = {"seed": 3, "noise": {"swap": 0.4}}
    sections = {"data": data, "loss": {"target": "hard"}, "optimizer": {"steps": 40}, "job": job}
    assert made == Config.from_dict(sections)


def test_a_study_may_do_without_conditions_and_say_what_a_seed_is(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    given = {key: value for key, value in SMALL.items() if key != "conditions"}
    file.write_text(yaml.safe_dump({**given, "seed_options": ["job.seed"]}))
    runs = read_study(file).runs
    assert [run.name for run in runs] == ["hard/seed-3", "psd/seed-3", "hard/seed-1", "psd/seed-1"]
    assert (runs[0].config.job.seed, runs[0].config.data.seed) == (3, 0)


def test_a_study_may_begin_with_a_configuration_beside_it(tmp_path: Path) -> None:
    sections = {"optimizer": {"steps": 7, "lr": 0.5}, "job": {"threads": 2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    study = read_study(write(tmp_path, config="run.yaml"))
    made = study.runs[0].config
    assert (made.optimizer.steps, made.optimizer.lr) == (40, 0.5)  # the study's own sections go on top
    assert (made.job.processes, made.job.threads) == (1, 2)  # one core, unless it is said otherwise
    kept = tmp_path / "elsewhere" / "study.yaml"
    kept.parent.mkdir()
    kept.write_text(study.to_yaml())  # which needs no other file
    assert read_study(kept).runs == study.runs


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"sedes": [1]}, "unknown sedes; allowed: config, base, seeds"),
        ({"seeds": []}, r"seeds=\[\]; allowed: a list of different whole numbers"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]; allowed: a list of different whole numbers"),
        ({"seeds": [True]}, r"seeds=\[True\]"),
        ({"seeds": [-1]}, r"seeds=\[-1\]"),
        ({"seeds": 3}, "seeds=3"),
        ({"seed_options": []}, r"seed_options=\[\]; allowed: a list of options"),
        ({"seed_options": ["job.sede"]}, "clean/hard, seed 3: unknown option of 'job': sede"),
        ({"runs": {}}, "runs={}; allowed: names, each with its options"),
        ({"runs": {"a/b": {}}}, "runs: the name 'a/b'; allowed: letters"),
        ({"runs": {"..": {}}}, r"runs: the name '\.\.'; allowed: letters"),
        ({"runs": {True: {}}}, "runs: the name True; allowed: letters"),
        ({"runs": {"hard": 3}}, "runs.hard=3; allowed: options as section.name: value"),
        ({"runs": {"hard": {"target": "hard"}}}, "clean/hard, seed 3: 'target=hard': write section.name=value"),
        ({"runs": {"hard": {"runs": ["hard"]}}}, "clean/hard, seed 3: .*write section.name=value"),
        ({"runs": {"hard": {"loss.target": "soft"}}}, "clean/hard, seed 3: loss.target='soft'; allowed: 'hard', 'psd'"),
        ({"runs": {"hard": {"job.seed": 5}}}, "hard sets job.seed, which the seeds set"),
        ({"conditions": {"clean": {"data.seed": 5}}}, "hard sets data.seed, which the seeds set"),
        (
            {"conditions": {"clean": {"runs": ["soft"]}}},
            r"conditions.clean.runs=\['soft'\]; allowed: some of hard, psd",
        ),
        ({"conditions": {"clean": {"runs": []}}}, r"conditions.clean.runs=\[\]; allowed: some of hard, psd"),
        ({"conditions": {}}, "conditions={}; allowed: names"),
        ({"base": {"job": 3}}, "allowed: sections, each with its options"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"config": 3}, "config=3; allowed: a text"),
        ({"reference": "soft"}, "reference='soft'; allowed: one of hard, psd"),
        ({"primary": 3}, "primary=3; allowed: a text"),
        ({"means": ["a/*"]}, r"means=\['a/\*'\]; allowed: names, each with a list of patterns"),
        ({"means": {"a": []}}, r"means={'a': \[\]}; allowed: names"),
        ({"means": {"a/b": ["c"]}}, r"means={'a/b': \['c'\]}; allowed: names"),
    ),
)
def test_what_a_study_may_not_say_is_named_with_what_is_allowed(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        read_study(write(tmp_path, **changes))
    assert str(tmp_path) in str(refused.value)


def test_the_study_that_comes_with_the_trainer_differs_from_the_default_run_as_it_says() -> None:
    runs = read_study(ROOT / "train" / "configs" / "study.yaml").runs
    by_name = {run.name: run.config for run in runs}
    assert len(runs) == 24 and {run.seed for run in runs} == {1, 2, 3}
    assert {run.method for run in runs if run.condition == "swap40"} == {"hard", "smoothing", "paired", "sharp"}
    paired = by_name["clean/paired/seed-1"]
    default = load()
    assert (default.loss.target, paired.loss.target, paired.loss.alpha_end) == ("psd", "psd", default.loss.alpha_end)
    assert {key: spec.partition("@")[0] for key, spec in paired.data.evaluate.items()} == default.data.evaluate
    assert paired.data.noise == {} and by_name["swap40/paired/seed-1"].data.noise == {"swap": 0.4}
    assert paired.loss.alpha()(332) == 0.0 and paired.loss.alpha()(700) == 0.3
