"""Every option of a run, by section: frozen dataclasses that check themselves. config reads them.

Every message of a ConfigError names the value, what is allowed and the way out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .loss_options import LossOptions
from .option_checks import ConfigError, at_least, one_of, within

MAX_SEED = 2**63 - 1  # torch's generators take no larger one
__all__ = ["ConfigError", "DataOptions", "JobOptions", "LossOptions", "ModelOptions", "OptimizerOptions"]

NOISE = ("swap", "near_swap", "partial", "wrong_word", "junk")  # kinds of data.noise
SKIP_WINDOW = 1000  # steps over which job.max_skipped_share is taken


@dataclass(frozen=True)
class DataOptions:
    """What is trained on, and what is evaluated on. data.sources.open_source has the forms of a source.

    source            image-text pairs; several with `::` between them
    weights           of each source named by `::`, how often an epoch takes its pairs; empty: once
    evaluate          sources by name, on which retrieval is measured
    classes           a JSON file of class names and the texts of each, for zero-shot classification of those records of
                      `evaluate` that name one of them; None: the classes that these records name, each by its name
    templates         sentences with `{}` where a text of a class stands, of whose embeddings a class's is the mean;
                      empty: the text alone
    probe             image-text pairs whose records name a class, on which a linear probe is trained, to be measured on
                      those of `evaluate` that do so; None: no probe
    distinct          `label`: no batch holds two records of one label; `none`: labels play no part
    image_key         suffixes of the pictures in shards and folders, with `;` between them
    text_key          suffixes of the captions there, likewise
    image_column      of a table, the column of pictures; None: a customary name (data.sources.columns)
    caption_column    of a table, the column of captions; None: likewise
    index             folder for the indexes of shards; None: beside them where it can be written, else the cache
    epoch_samples     of a stream, which has no length: how many samples count as an epoch
    workers           processes that read and prepare, for each rank; None: what the cores allow on GPUs, 0 on a CPU
    prefetch          how many steps' samples they may be ahead
    max_pixels        a larger picture is bad
    max_bad_fraction  share of the samples that may be bad
    seed              fixes which captions are made wrong, and of the emoji set the splits and the wording
    noise             share of the records whose captions are made wrong, by kind; data.noise says what each does
    """

    source: str = "emoji:train"
    weights: tuple[float, ...] = ()
    evaluate: dict[str, str] = field(default_factory=dict)
    classes: str | None = None
    templates: tuple[str, ...] = ()
    probe: str | None = None
    distinct: str = "none"
    image_key: str = "jpg;jpeg;png;webp"
    text_key: str = "txt"
    image_column: str | None = None
    caption_column: str | None = None
    index: str | None = None
    epoch_samples: int | None = None
    workers: int | None = None
    prefetch: int = 1
    max_pixels: int = 25_000_000
    max_bad_fraction: float = 0.01
    seed: int = 0
    noise: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = {
            "data.source": self.source,
            "data.classes": self.classes,
            "data.probe": self.probe,
            "data.index": self.index,
        }
        paths |= {f"data.evaluate.{name}": source for name, source in self.evaluate.items()}
        for name, path in paths.items():
            if path is not None and ("\0" in path or not path.strip()):
                raise ConfigError(f"{name}={path!r}; allowed: a path, which is not empty and holds no NUL")
        if self.weights and len(self.weights) != self.source.count("::") + 1:
            raise ConfigError(
                f"data.weights={list(self.weights)} for {self.source.count('::') + 1} sources; allowed: one for each"
            )
        for weight in self.weights:
            within("data.weights", weight, 1e-6, 1e6)
        one_of("data.distinct", self.distinct, ("none", "label"))
        if self.epoch_samples is not None:
            at_least("data.epoch_samples", self.epoch_samples, 1)
        if self.workers is not None:
            at_least("data.workers", self.workers, 0)
        at_least("data.prefetch", self.prefetch, 1)
        at_least("data.max_pixels", self.max_pixels, 1)
        within("data.max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        within("data.seed", self.seed, 0, MAX_SEED)
        for kind, share in self.noise.items():
            one_of("data.noise: the kind", kind, NOISE)
            within(f"data.noise.{kind}", share, 0.0, 1.0)
        if sum(self.noise.values()) > 1.0:
            raise ConfigError(f"data.noise={self.noise}; allowed: shares that together are at most 1")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ConfigError(f"data.templates: {template!r}; allowed: a sentence that holds {{}} once")


@dataclass(frozen=True)
class ModelOptions:
    """The two towers. towers.build has the forms of `towers`.

    towers                  `small`, whose own options stand last here, or a library's
    options                 keyword arguments for that library's constructor
    image_size              height and width of the pictures in pixels; None: the tower's own, 48 for `small`
    context_length          tokens of a caption, beyond which it is cut; None: the tower's own, 12 for `small`
    initial_scale           logit scale at the start; None: the tower's own, 1 / 0.07 as in CLIP for `small`
    lock                    `image` or `text`: that tower is not trained (LiT)
    gradient_checkpointing  compute activations again in the backward pass
    compile                 torch.compile the towers
    embed_dim               width of the shared embedding
    image_widths            channels of the image tower's stages, multiples of 8, each at half the resolution of the one
                            before
    """

    towers: str = "small"
    options: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    context_length: int | None = None
    initial_scale: float | None = None
    lock: str = "none"
    gradient_checkpointing: bool = False
    compile: bool = False
    embed_dim: int = 256
    image_widths: tuple[int, ...] = (32, 64, 128)
    text_width: int = 192
    text_layers: int = 2
    text_heads: int = 3
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        if self.image_size is not None:
            at_least("model.image_size", self.image_size, 16)
        if self.context_length is not None:
            at_least("model.context_length", self.context_length, 3)
        if self.initial_scale is not None:
            within("model.initial_scale", self.initial_scale, 1.0, 100.0)
        one_of("model.lock", self.lock, ("none", "image", "text"))
        for name in ("embed_dim", "text_width", "text_layers", "text_heads"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.vocab_size", self.vocab_size, 300)  # 256 bytes, the special tokens and some merges
        if not self.image_widths or any(width < 8 or width % 8 for width in self.image_widths):
            raise ConfigError(f"model.image_widths={list(self.image_widths)}; allowed: one or more multiples of 8")
        if self.text_width % self.text_heads:
            raise ConfigError(
                f"model.text_width={self.text_width} must be a multiple of model.text_heads={self.text_heads}"
            )


@dataclass(frozen=True)
class OptimizerOptions:
    """How parameters follow from gradients. The learning rate rises linearly over `warmup_steps` to its peak `lr`.

    name                 `adamw`, `sgd` (with betas[0] as momentum), or `timm:NAME`, of timm's optimizers
    schedule             then: `cosine` falls by half a cosine to `final_lr_fraction` of the peak; `constant` stays;
                         `cooldown` stays, and falls linearly to it in the last `cooldown_steps`
    batch_size           pairs in a batch, of all processes together
    micro_batches        parts that a process cuts its share into. Where there are several, each is encoded twice, and
                         one part's activations are held at a time
    micro_batch_tokens   in its place, how many tokens (patches and pieces of text) a part may hold, padding counted
    layer_decay          factor of the learning rate from each layer to the one below it; None: none
    """

    name: str = "adamw"
    schedule: str = "cosine"
    steps: int = 420
    batch_size: int = 512
    micro_batches: int = 1
    micro_batch_tokens: int | None = None
    lr: float = 1.5e-3
    warmup_steps: int = 30
    cooldown_steps: int = 0
    final_lr_fraction: float = 0.01
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.98)
    eps: float = 1e-8
    layer_decay: float | None = None
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd") and not self.name.removeprefix("timm:").isidentifier():
            raise ConfigError(f"optimizer.name={self.name!r}; allowed: 'adamw', 'sgd', or 'timm:' and a name of timm's")
        one_of("optimizer.schedule", self.schedule, ("cosine", "constant", "cooldown"))
        at_least("optimizer.steps", self.steps, 1)
        at_least("optimizer.batch_size", self.batch_size, 2)
        at_least("optimizer.micro_batches", self.micro_batches, 1)
        if self.micro_batch_tokens is not None:
            at_least("optimizer.micro_batch_tokens", self.micro_batch_tokens, 1)
            if self.micro_batches > 1:
                raise ConfigError(
                    f"optimizer.micro_batches={self.micro_batches} and "
                    f"optimizer.micro_batch_tokens={self.micro_batch_tokens}; allowed: one of them"
                )
        at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        at_least("optimizer.cooldown_steps", self.cooldown_steps, 0)
        if self.schedule == "cooldown" and not 1 <= self.cooldown_steps <= self.steps:
            raise ConfigError(
                f"optimizer.cooldown_steps={self.cooldown_steps} with optimizer.schedule='cooldown'; allowed: 1 to "
                f"{self.steps}, the steps of the run"
            )
        within("optimizer.lr", self.lr, 0.0, 1.0)
        within("optimizer.final_lr_fraction", self.final_lr_fraction, 0.0, 1.0)
        within("optimizer.weight_decay", self.weight_decay, 0.0, 10.0)
        within("optimizer.eps", self.eps, 1e-16, 1.0)
        if self.layer_decay is not None:
            within("optimizer.layer_decay", self.layer_decay, 1e-3, 1.0)
        within("optimizer.max_grad_norm", self.max_grad_norm, 1e-6, 1e6)
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optimizer.betas={list(self.betas)}: two numbers in [0, 1)")

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0: a pure function, so that resuming needs no state."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cooldown":
            left = min(max(self.steps - step, 0) / self.cooldown_steps, 1.0)
        else:
            progress = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
            left = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.final_lr_fraction + (1.0 - self.final_lr_fraction) * left)


@dataclass(frozen=True)
class JobOptions:
    """How a run is carried out.

    processes              how many the program starts; 0 for one per GPU, or two on a CPU
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
    zero_stage             of DeepSpeed ZeRO, 0 to 3
    offload_optimizer      its state lies in the CPU's memory
    offload_parameters     so do the parameters between uses: ZeRO-3
    precision              of the towers: `bf16` or `fp16` autocast, `fp32`, or `auto`
    threads                CPU threads of each process; None: OMP_NUM_THREADS where a person set it, else an equal share
    report                 besides JSONL and TensorBoard: `none`, `wandb` or `trackio`
    """

    processes: int = 0
    device: str = "auto"
    zero_stage: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    precision: str = "auto"
    threads: int | None = None
    report: str = "none"
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
        at_least("job.processes", self.processes, 0)
        one_of("job.device", self.device, ("auto", "cpu", "cuda"))
        one_of("job.zero_stage", self.zero_stage, (0, 1, 2, 3))
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError("job.offload_optimizer=true with job.zero_stage=0; allowed: with stages 1 to 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ConfigError(f"job.offload_parameters=true with job.zero_stage={self.zero_stage}; allowed: with 3")
        one_of("job.precision", self.precision, ("auto", "bf16", "fp16", "fp32"))
        if self.threads is not None:
            at_least("job.threads", self.threads, 1)
        one_of("job.report", self.report, ("none", "wandb", "trackio"))
        within("job.seed", self.seed, 0, MAX_SEED)
        at_least("job.checkpoint_every", self.checkpoint_every, 1)
        at_least("job.keep_checkpoints", self.keep_checkpoints, 2)  # a damaged one falls back to the one before
        at_least("job.keep_every", self.keep_every, 0)
        at_least("job.evaluate_every", self.evaluate_every, 0)
        one_of("job.on_nonfinite", self.on_nonfinite, ("skip", "stop"))
        at_least("job.max_skipped_in_a_row", self.max_skipped_in_a_row, 0)
        within("job.max_skipped_share", self.max_skipped_share, 0.0, 1.0)
        at_least("job.timeout_seconds", self.timeout_seconds, 5)
        at_least("job.setup_timeout_seconds", self.setup_timeout_seconds, 5)
