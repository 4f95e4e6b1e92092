"""The configuration of a run: the options of a YAML file, and `section.name=value` overrides on top."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import yaml

from .options import ConfigError, DataOptions, JobOptions, LossOptions, ModelOptions, OptimizerOptions

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_FILE, EMPTY_FILE = CONFIGS / "emoji.yaml", CONFIGS / "pairs.yaml"
# The options that may have another value when a run goes on: where its data and teachers lie (a fingerprint tells
# whether they are the same), how far it goes, how it is computed, watched and kept. All others say what is trained on
# what, and a checkpoint is a part of that.
CHANGEABLE = (
    "data.source",
    "data.evaluate",
    "data.classes",
    "data.templates",
    "data.probe",
    "data.index",
    "data.workers",
    "data.prefetch",
    "data.max_bad_fraction",
    "model.gradient_checkpointing",
    "model.compile",
    "loss.teachers",
    "loss.backend",
    "optimizer.steps",
    "optimizer.micro_batches",
    "optimizer.micro_batch_tokens",
    "job.device",
    "job.processes",
    "job.zero_stage",
    "job.offload_optimizer",
    "job.offload_parameters",
    "job.threads",
    "job.checkpoint_every",
    "job.keep_checkpoints",
    "job.keep_every",
    "job.evaluate_every",
    "job.on_nonfinite",
    "job.max_skipped_in_a_row",
    "job.max_skipped_share",
    "job.timeout_seconds",
    "job.setup_timeout_seconds",
    "job.report",
    "deepspeed",
)
# Options of earlier versions, and what stands in their place.
REPLACED = {
    "job.max_skipped": "job.max_skipped_in_a_row and job.max_skipped_share",
    "data.folder": "data.source",
    "data.image_size": "model.image_size",
}


@dataclass(frozen=True)
class Config:
    """All options of a run, by section. `deepspeed`: of DeepSpeed's own configuration, whatever no option here says;
    see deepspeed_options."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    job: JobOptions = field(default_factory=JobOptions)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, lists and scalars, as YAML and JSON take them."""
        return {
            section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            for section, values in asdict(self).items()
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Config:
        """From nested mappings; what is left out keeps its default."""
        sections = {section.name: section.default_factory for section in fields(cls)}
        _known("section", mapping, sections)
        made: dict[str, Any] = {}
        for name, values in mapping.items():
            if not isinstance(values, dict):
                raise ConfigError(f"section {name!r} is {values!r}; write its options as `name: value` lines below it")
            kind = cast(type, sections[name])
            made[name] = copy.deepcopy(values) if kind is dict else _section(name, kind, values)
        return cls(**made)


def file_of(file: Path | None, overrides: Sequence[str]) -> Path:
    """The configuration that is meant: the emoji run's where none is given, or, where an override names other data, one
    that says nothing, so that every option has its default."""
    own_data = any(override.strip().startswith("data.source=") for override in overrides)
    return Path(file) if file is not None else EMPTY_FILE if own_data else DEFAULT_FILE


def load(file: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (see file_of) with `section.name=value` overrides on top."""
    path = file_of(file, overrides)
    return _made(read(path), overrides, path)


def read(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError where it holds none."""
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes that are no text, absurd dates
        raise ConfigError(f"the configuration {path} is not YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"the configuration {path} holds {type(mapping).__name__}; a mapping of sections is needed")
    return mapping


def changed(settings: Config, overrides: Sequence[str], path: Path) -> Config:
    """`settings`, which are of file `path`, with `section.name=value` overrides on top."""
    return _made(settings.to_dict(), overrides, path)


def _made(mapping: dict[str, Any], overrides: Sequence[str], path: Path) -> Config:
    for override in overrides:
        _override(mapping, override, path)
    return Config.from_dict(mapping)


def _override(mapping: dict[str, Any], override: str, path: Path) -> None:
    """Put `section.name=value` into the mapping, which is of file `path`."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{override!r}: write section.name=value, for example optimizer.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML") from error
    put(mapping, key, value, path)


def put(mapping: dict[str, Any], key: str, value: Any, path: Path) -> None:
    """Give option `section.name` of the mapping, which is of file `path`, a value; more names lead further down
    (data.evaluate.NAME)."""
    names = key.strip().split(".")
    if len(names) < 2 or not all(names):
        raise ConfigError(f"'{key}={value}': write section.name=value, for example optimizer.steps=100")
    inner = mapping
    for depth, name in enumerate(names[:-1], 1):
        inner = inner.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"'{key}={value}': {'.'.join(names[:depth])!r} is no section of {path}")
    inner[names[-1]] = value


def changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The options of `after` that differ from `before`, by `section.name`: their values (then, now). Of the free-form
    section `deepspeed` it is the section."""
    then, now = before.to_dict(), after.to_dict()
    differ = {"deepspeed": (then.pop("deepspeed"), now.pop("deepspeed"))}
    differ |= {
        f"{section}.{name}": (then[section][name], now[section][name]) for section in then for name in then[section]
    }
    return {name: pair for name, pair in differ.items() if pair[0] != pair[1]}


def _section(section: str, kind: type, values: dict[str, Any]) -> Any:
    if section == "data" and "corrupt" in values:  # of an earlier version: data.noise.swap says the same
        values = dict(values)
        swap = values.pop("corrupt")
        values["noise"] = ({"swap": swap} if swap else {}) | values.get("noise", {})
    known = {option.name: option for option in fields(kind)}
    for name in sorted(str(name) for name in values if f"{section}.{name}" in REPLACED):
        raise ConfigError(f"{section}.{name} is of an earlier version; give {REPLACED[f'{section}.{name}']} instead")
    _known(f"option of {section!r}", values, known)
    return kind(**{name: _typed(f"{section}.{name}", value, str(known[name].type)) for name, value in values.items()})


def _typed(name: str, value: Any, annotation: str) -> Any:
    """`value` as the annotation says; YAML reads 1e-3 as text and 1 as an integer, both of which are fine floats."""
    base = annotation.removesuffix(" | None")
    try:
        if value is None and base != annotation:
            return None
        if base.startswith("tuple") and isinstance(value, (list, tuple)):
            return tuple(_typed(name, element, base.removeprefix("tuple[").split(",")[0]) for element in value)
        if base == "bool" and isinstance(value, bool):
            return value
        if base.startswith("dict") and isinstance(value, dict):
            kind = base.removesuffix("]").split(", ")[1]
            return {
                str(key): element if kind == "Any" else _typed(f"{name}.{key}", element, kind)
                for key, element in value.items()
            }
        if base == "int" and isinstance(value, int) and not isinstance(value, bool):
            return value
        if base == "float" and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
        if base == "str" and isinstance(value, str):
            return value
    except ConfigError:  # of an element
        raise
    except ValueError:
        pass
    raise ConfigError(f"{name}={value!r} is {type(value).__name__}; allowed: {annotation}")


def _known(what: str, given: dict[str, Any], allowed: dict[str, Any]) -> None:
    unknown = sorted(str(name) for name in given if name not in allowed)
    if unknown:
        raise ConfigError(f"unknown {what}: {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}")
