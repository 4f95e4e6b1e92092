"""What a run is made of: frozen dataclasses, read from YAML and `section.name=value` overrides, checked once.

Every message of a ConfigError names the value, what is allowed and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import yaml

from softclip_kernels import backends, schedules

DEFAULT_FILE = Path(__file__).parent / "configs" / "emoji.yaml"
# The options that may have another value when a run goes on: how far it goes, how it is watched and kept, and which
# kernels compute the same loss. All others say what is trained on what, and a checkpoint is a part of that.
CHANGEABLE = (
    "data.folder",
    "data.max_bad_fraction",
    "loss.backend",
    "optimizer.steps",
    "optimizer.micro_batches",
    "job.device",
    "job.checkpoint_every",
    "job.keep_checkpoints",
    "job.keep_every",
    "job.evaluate_every",
    "job.on_nonfinite",
    "job.max_skipped_in_a_row",
    "job.max_skipped_share",
    "job.timeout_seconds",
    "job.setup_timeout_seconds",
)
# Options of earlier versions, and what stands in their place.
REPLACED = {"job.max_skipped": "job.max_skipped_in_a_row and job.max_skipped_share"}
MAX_SEED = 2**63 - 1  # torch's generators take no larger one
SKIP_WINDOW = 1000  # steps over which job.max_skipped_share is taken


class ConfigError(ValueError):
    """A configuration that cannot be run."""


@dataclass(frozen=True)
class DataOptions:
    """What is trained on.

    folder            one made by prepare_emoji or laid out like it; None for the emoji set, which is fetched on demand
    image_size        height and width of the pictures in pixels
    seed              fixes the splits, the wording of the captions, and which of them are corrupted
    corrupt           share of the training captions that are exchanged between concepts
    max_bad_fraction  share of a split's samples that may be unreadable
    """

    folder: str | None = None
    image_size: int = 48
    seed: int = 0
    corrupt: float = 0.0
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if "\0" in (self.folder or ""):
            raise ConfigError(f"data.folder={self.folder!r}; allowed: a path, which holds no NUL")
        _at_least("data.image_size", self.image_size, 16)
        _within("data.seed", self.seed, 0, MAX_SEED)
        _within("data.corrupt", self.corrupt, 0.0, 1.0)
        _within("data.max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)


@dataclass(frozen=True)
class ModelOptions:
    """The two towers. `image_widths`: channels of the image tower's stages, multiples of 8, each at half the resolution
    of the one before."""

    embed_dim: int = 256
    image_widths: tuple[int, ...] = (32, 64, 128)
    text_width: int = 192
    text_layers: int = 2
    text_heads: int = 3
    vocab_size: int = 4096
    context_length: int = 12
    initial_scale: float = 14.3  # 1 / 0.07, as in CLIP

    def __post_init__(self) -> None:
        for name in ("embed_dim", "text_width", "text_layers", "text_heads"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        _at_least("model.vocab_size", self.vocab_size, 300)  # 256 bytes, the special tokens and some merges
        _at_least("model.context_length", self.context_length, 3)
        _within("model.initial_scale", self.initial_scale, 1.0, 100.0)
        if not self.image_widths or any(width < 8 or width % 8 for width in self.image_widths):
            raise ConfigError(f"model.image_widths={list(self.image_widths)}; allowed: one or more multiples of 8")
        if self.text_width % self.text_heads:
            raise ConfigError(
                f"model.text_width={self.text_width} must be a multiple of model.text_heads={self.text_heads}"
            )


@dataclass(frozen=True)
class LossOptions:
    """`target`: psd (progressive self-distillation) or hard (CLIP).

    The soft share α is 0 for `hard_steps` steps, then goes from `alpha_start` to `alpha_end` over `rise_steps` by
    `schedule` and stays there.
    """

    target: str = "psd"
    schedule: str = "cosine"
    hard_steps: int = 120
    rise_steps: int = 240
    alpha_start: float = 0.0
    alpha_end: float = 0.3
    swap: str = "paired"
    scope: str = "full"
    teacher_scale: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        _one_of("loss.target", self.target, ("psd", "hard"))
        _one_of("loss.schedule", self.schedule, ("constant", "linear", "cosine"))
        _one_of("loss.swap", self.swap, ("none", "paired"))
        _one_of("loss.scope", self.scope, ("full", "block"))
        # A run that was started under a former name of its backend goes on, and says the name it has now.
        object.__setattr__(self, "backend", backends.current_name(self.backend))
        _one_of("loss.backend", self.backend, ("auto", *backends.registered()))
        _at_least("loss.hard_steps", self.hard_steps, 0)
        _at_least("loss.rise_steps", self.rise_steps, 1)
        _within("loss.alpha_start", self.alpha_start, 0.0, 1.0)
        _within("loss.alpha_end", self.alpha_end, 0.0, 1.0)
        if self.teacher_scale is not None:
            _within("loss.teacher_scale", self.teacher_scale, 1e-3, 1e3)

    def alpha(self) -> schedules.Schedule:
        """The soft share as a pure function of the step, counted from 0."""
        if self.target != "psd":
            return schedules.Constant(0.0)
        if self.schedule == "constant":
            after: schedules.Schedule = schedules.Constant(self.alpha_end)
        else:
            ramp = {"linear": schedules.Linear, "cosine": schedules.Cosine}[self.schedule]
            after = ramp(self.alpha_start, self.alpha_end, self.rise_steps)
        return schedules.WarmUp(self.hard_steps, after)


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW. `batch_size` is that of all processes together; each process encodes its share in `micro_batches` parts,
    twice where there are several, and holds one part's activations at a time. The learning rate rises linearly over
    `warmup_steps` and falls by half a cosine to `final_lr_fraction` of its peak `lr`.
    """

    steps: int = 420
    batch_size: int = 512
    micro_batches: int = 1
    lr: float = 1.5e-3
    warmup_steps: int = 30
    final_lr_fraction: float = 0.01
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.98)
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _at_least("optimizer.steps", self.steps, 1)
        _at_least("optimizer.batch_size", self.batch_size, 2)
        _at_least("optimizer.micro_batches", self.micro_batches, 1)
        _at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        _within("optimizer.lr", self.lr, 0.0, 1.0)
        _within("optimizer.final_lr_fraction", self.final_lr_fraction, 0.0, 1.0)
        _within("optimizer.weight_decay", self.weight_decay, 0.0, 10.0)
        _within("optimizer.max_grad_norm", self.max_grad_norm, 1e-6, 1e6)
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optimizer.betas={list(self.betas)}: two numbers in [0, 1)")

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0: a pure function, so that resuming needs no state."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.final_lr_fraction + (1.0 - self.final_lr_fraction) * cosine)


@dataclass(frozen=True)
class JobOptions:
    """How a run is carried out.

    processes              how many `python -m train` starts; 0 for one per GPU, or two on a CPU
    seed                   of the initial weights, the batches, the augmentation and the PSD draw
    checkpoint_every       in steps
    keep_checkpoints       how many of the newest stay on disk
    keep_every             besides those, the first checkpoint of each so many steps is never removed; 0 for none
    evaluate_every         in steps; 0 evaluates at the end only
    on_nonfinite           what all ranks do together where a loss or gradient is not finite: `skip` it, or `stop`
    max_skipped_in_a_row   how many batches may be skipped one after another; one more stops the job
    max_skipped_share      share of the last SKIP_WINDOW steps that may be skipped; one more stops the job
    timeout_seconds        how long the job may stand still before it ends
    setup_timeout_seconds  the same before the first step, where data may be fetched
    """

    processes: int = 0
    device: str = "auto"
    zero_stage: int = 1
    precision: str = "auto"
    seed: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    keep_every: int = 10_000
    evaluate_every: int = 60
    on_nonfinite: str = "skip"
    max_skipped_in_a_row: int = 10
    max_skipped_share: float = 0.02
    timeout_seconds: int = 180
    setup_timeout_seconds: int = 900

    def __post_init__(self) -> None:
        _at_least("job.processes", self.processes, 0)
        _one_of("job.device", self.device, ("auto", "cpu", "cuda"))
        _one_of("job.zero_stage", self.zero_stage, (1, 2, 3))
        _one_of("job.precision", self.precision, ("auto", "bf16", "fp32"))
        _within("job.seed", self.seed, 0, MAX_SEED)
        _at_least("job.checkpoint_every", self.checkpoint_every, 1)
        _at_least("job.keep_checkpoints", self.keep_checkpoints, 2)  # a damaged one falls back to the one before
        _at_least("job.keep_every", self.keep_every, 0)
        _at_least("job.evaluate_every", self.evaluate_every, 0)
        _one_of("job.on_nonfinite", self.on_nonfinite, ("skip", "stop"))
        _at_least("job.max_skipped_in_a_row", self.max_skipped_in_a_row, 0)
        _within("job.max_skipped_share", self.max_skipped_share, 0.0, 1.0)
        _at_least("job.timeout_seconds", self.timeout_seconds, 5)
        _at_least("job.setup_timeout_seconds", self.setup_timeout_seconds, 5)


@dataclass(frozen=True)
class Config:
    """All options of a run, by section."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    job: JobOptions = field(default_factory=JobOptions)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and scalars, as YAML and JSON take them."""
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
        made = {}
        for name, values in mapping.items():
            if not isinstance(values, dict):
                raise ConfigError(f"section {name!r} is {values!r}; write its options as `name: value` lines below it")
            made[name] = _section(name, cast(type, sections[name]), values)
        return cls(**made)


def load(file: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (the emoji run's by default) with `section.name=value` overrides on top."""
    path = DEFAULT_FILE if file is None else Path(file)
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes that are no text, absurd dates
        raise ConfigError(f"the configuration {path} is not YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"the configuration {path} holds {type(mapping).__name__}; a mapping of sections is needed")
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and section and name):
            raise ConfigError(f"{override!r}: write section.name=value, for example optimizer.steps=100")
        values = mapping.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {section!r} is no section of {path}")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: the value is not YAML") from error
    return Config.from_dict(mapping)


def changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The options of `after` that differ from `before`, by `section.name`: their values (then, now)."""
    now = after.to_dict()
    return {
        f"{section}.{name}": (value, now[section][name])
        for section, values in before.to_dict().items()
        for name, value in values.items()
        if value != now[section][name]
    }


def _section(section: str, kind: type, values: dict[str, Any]) -> Any:
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
        if base == "int" and isinstance(value, int) and not isinstance(value, bool):
            return value
        if base == "float" and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
        if base == "str" and isinstance(value, str):
            return value
    except ValueError:
        pass
    raise ConfigError(f"{name}={value!r} is {type(value).__name__}; allowed: {annotation}")


def _known(what: str, given: dict[str, Any], allowed: dict[str, Any]) -> None:
    unknown = sorted(str(name) for name in given if name not in allowed)
    if unknown:
        raise ConfigError(f"unknown {what}: {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}; allowed: {', '.join(map(repr, allowed))}")


def _at_least(name: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise ConfigError(f"{name}={value}; allowed: {lowest} or more")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also catches NaN
        raise ConfigError(f"{name}={value}; allowed: {low} to {high}")
