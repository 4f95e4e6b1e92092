"""A study's file: which runs there are, each with its configuration.

config: emoji.yaml                # what every run begins with, beside the study's file; left out: every default
base:                             # on top of it, sections as in a configuration
  optimizer: {steps: 1000}
seeds: [1, 2, 3]
seed_options: [job.seed, data.seed]
conditions:                       # left out: a grid of methods and seeds alone
  clean: {}
  swap40: {data.noise.swap: 0.4, runs: [hard, paired]}   # `runs`: the methods here; left out: all
runs:                             # the methods
  hard: {loss.target: hard}
  paired: {loss.target: psd}
reference: hard                   # which `compare` takes the differences to
means:                            # metrics of the study's own, each the mean of all that fit one of its patterns
  recalls: [heldout/*_recall@*, vendor/*_recall@*]
primary: mean/recalls             # the metric that the study was made for
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import config
from ..config import Config, ConfigError
from ..options import MAX_SEED

KEYS = ("config", "base", "seeds", "seed_options", "conditions", "runs", "reference", "means", "primary")
SEED_OPTIONS = ("job.seed", "data.seed")
ONE_CORE = {"processes": 1, "threads": 1}  # of a run's job, unless the study says otherwise: runs stand side by side
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # of a method or a condition, which is a folder


@dataclass(frozen=True)
class Run:
    """One run of a study. `condition`: "" where the study has none."""

    condition: str
    method: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.condition, self.method, f"seed-{self.seed}")))


@dataclass(frozen=True)
class Study:
    """A study.

    runs   in the order in which they are carried out: seed by seed, so that pairs of one seed come early
    given  what its file says, in a form that needs no other file
    """

    runs: tuple[Run, ...]
    given: dict[str, Any]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.given, sort_keys=False, allow_unicode=True)


def read_study(path: Path) -> Study:
    """Raises ConfigError where the file is no study, or a run's configuration is refused; nothing is computed."""
    given = config.read(path)
    unknown = sorted(str(key) for key in given if key not in KEYS)
    if unknown:
        raise ConfigError(f"{path}: unknown {', '.join(unknown)}; allowed: {', '.join(KEYS)}")
    methods = _named(path, "runs", given.get("runs"))
    conditions = _named(path, "conditions", given["conditions"]) if "conditions" in given else {"": {}}
    seeds, seed_options = _seeds(path, given), _seed_options(path, given)
    base = _base(path, given)
    chosen = {name: _methods_of(path, name, condition, methods) for name, condition in conditions.items()}
    runs = []
    for seed in seeds:
        for condition, options in conditions.items():
            for method in chosen[condition]:
                changes = {**{key: value for key, value in options.items() if key != "runs"}, **methods[method]}
                taken = sorted(set(changes) & set(seed_options))
                if taken:
                    raise ConfigError(
                        f"{path}: {method} sets {', '.join(taken)}, which the seeds set; leave it out there"
                    )
                changes |= dict.fromkeys(seed_options, seed)
                runs.append(_run(path, base, changes, condition, method, seed))
    for key in ("reference", "primary"):
        _text(path, given, key)
    _check_means(path, given.get("means", {}))
    if given.get("reference", next(iter(methods))) not in methods:
        raise ConfigError(f"{path}: reference={given['reference']!r}; allowed: one of {', '.join(methods)}")
    return Study(tuple(runs), {"base": base, **{key: given[key] for key in KEYS[2:] if key in given}})


def _run(path: Path, base: dict[str, Any], changes: dict[str, Any], condition: str, method: str, seed: int) -> Run:
    mapping = copy.deepcopy(base)
    try:
        for option, value in changes.items():
            config.put(mapping, option, value, path)
        return Run(condition, method, seed, Config.from_dict(mapping))
    except ConfigError as error:
        where = "/".join(filter(None, (condition, method)))
        raise ConfigError(f"{path}: {where}, seed {seed}: {error}") from error


def _base(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What every run begins with: one core, then the configuration, then the study's own sections."""
    layers = [{"job": ONE_CORE}]
    file = _text(path, given, "config")
    if file is not None:
        layers.append(config.read(path.parent / file))
    layers.append(given.get("base") or {})
    made: dict[str, Any] = {}
    for layer in layers:
        if not isinstance(layer, dict) or not all(isinstance(options, dict) for options in layer.values()):
            raise ConfigError(f"{path}: base={layer!r}; allowed: sections, each with its options below it")
        for section, options in layer.items():
            made.setdefault(section, {}).update(copy.deepcopy(options))
    return made


def _named(path: Path, key: str, given: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{path}: {key}={given!r}; allowed: names, each with its options as section.name: value")
    for name, options in given.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(f"{path}: {key}: the name {name!r}; allowed: letters, digits, '_', '-' and '.'")
        if not isinstance(options or {}, dict):
            raise ConfigError(f"{path}: {key}.{name}={options!r}; allowed: options as section.name: value")
    return {name: options or {} for name, options in given.items()}


def _methods_of(path: Path, name: str, condition: dict[str, Any], methods: dict[str, Any]) -> list[str]:
    chosen = condition.get("runs", list(methods))
    if not isinstance(chosen, list) or not chosen or any(method not in methods for method in chosen):
        raise ConfigError(f"{path}: conditions.{name}.runs={chosen!r}; allowed: some of {', '.join(methods)}")
    return list(dict.fromkeys(chosen))


def _seeds(path: Path, given: dict[str, Any]) -> list[int]:
    seeds = given.get("seeds")
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed <= MAX_SEED for seed in seeds)
    if not isinstance(seeds, list) or not seeds or not whole or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{path}: seeds={seeds!r}; allowed: a list of different whole numbers from 0, such as [1, 2, 3]"
        )
    return seeds


def _seed_options(path: Path, given: dict[str, Any]) -> list[str]:
    options = given.get("seed_options", list(SEED_OPTIONS))
    if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
        raise ConfigError(f"{path}: seed_options={options!r}; allowed: a list of options, such as {list(SEED_OPTIONS)}")
    return options


def _check_means(path: Path, means: Any) -> None:
    for name, patterns in means.items() if isinstance(means, dict) else [(means, None)]:
        texts = isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns)
        if not isinstance(name, str) or not NAME.fullmatch(name) or not texts or not patterns:
            raise ConfigError(f"{path}: means={means!r}; allowed: names, each with a list of patterns of SET/METRIC")


def _text(path: Path, given: dict[str, Any], key: str) -> str | None:
    value = given.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{path}: {key}={value!r}; allowed: a text")
    return value
