"""The teachers of a run beside the model itself: a moving average of its towers, and towers that stay as they are.

What they cost. `ema`: a whole fp32 copy of the towers on every rank, 4 bytes a parameter whatever the ZeRO stage, and
under ZeRO-3 an all-gather of the parameters after each step. A frozen teacher: its towers on every rank, and pictures
and tokens of its own in each batch. Both: where soft targets have a part in the step, a forward pass without a graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import deepspeed
import torch
from torch import Tensor

from . import checkpoint, towers
from .config import Config
from .loss_options import LossOptions
from .options import ConfigError, ModelOptions
from .targets import EMA, SELF, Taught, teachers_of
from .towers import Bundle, Contrastive
from .world import World, on_each, on_first


class Seen(Protocol):
    """What is encoded of a rank's share of a batch, b pairs, on its device.

    images  (b, 3, H, W) float32
    tokens  (b, L) int64
    views   for each frozen teacher, images and tokens as its towers take them
    """

    @property
    def images(self) -> Tensor: ...

    @property
    def tokens(self) -> Tensor: ...

    @property
    def views(self) -> Sequence[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Found:
    """Where a frozen teacher is: the folder of a checkpoint or a form of model.towers, and the SHA-256 of its
    weights."""

    place: str
    sha256: str


@dataclass(frozen=True)
class Teachers:
    """Those of loss.teachers that are modules of their own, on the device of the rank.

    ema     the moving average of the towers, alike to the last bit on all ranks; None where it is no teacher
    decay   its d, loss.ema_decay
    frozen  the others, by name, in their order
    found   likewise, where they are
    """

    ema: Contrastive | None = None
    decay: float = 0.0
    frozen: Mapping[str, Bundle] = field(default_factory=dict)
    found: Mapping[str, Found] = field(default_factory=dict)

    @torch.no_grad()
    def teach(self, batch: Seen, micro_batches: int) -> dict[str, Taught]:
        """What each makes of this rank's share, in as many parts as the student, without dropout."""
        taught = {}
        if self.ema is not None:
            taught[EMA] = _encode(self.ema, (batch.images, batch.tokens), micro_batches)
        for (name, bundle), view in zip(self.frozen.items(), batch.views, strict=True):
            taught[name] = _encode(bundle.module, view, micro_batches)
        return taught

    @torch.no_grad()
    def follow(self, engine: Any, step: int) -> None:
        """Move the average after step `step`, whose update was applied. Every rank calls it: under ZeRO-3 the student's
        parameters are gathered, one at a time."""
        if self.ema is None:
            return
        kept = min(self.decay, (1 + step) / (10 + step))
        partitioned = engine.zero_optimization_partition_weights()
        for mine, its in zip(self.ema.parameters(), engine.module.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([its] if partitioned else [], enabled=partitioned):
                mine.lerp_(its, 1.0 - kept)  # which leaves a locked parameter as it is, to the last bit
        for buffer, its in zip(self.ema.buffers(), engine.module.buffers(), strict=True):
            buffer.copy_(its)

    def fingerprint(self, loss: LossOptions) -> tuple[str, ...]:
        """See fingerprint.Fingerprint."""
        names = teachers_of(loss)
        if names == (SELF,):
            return ()
        return tuple(self.found[name].sha256 if name in self.found else name for name in names)

    def ema_weights(self) -> dict[str, Tensor]:
        """Of the moving average, on the CPU, copied; nothing where it is no teacher."""
        held = {} if self.ema is None else self.ema.state_dict()
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in held.items()}

    def resume(self, folder: Path) -> None:
        """Go on with the moving average of the checkpoint in `folder`. Raises CheckpointError where it does not fit."""
        if self.ema is None:
            return
        try:
            self.ema.load_state_dict(checkpoint.read_ema(folder))
        except RuntimeError as error:  # other names or shapes
            raise checkpoint.CheckpointError(
                f"{folder}: {checkpoint.EMA_WEIGHTS} is not of these towers ({error}); start a new run"
            ) from error


ALONE = Teachers()  # the model itself, or nobody


def _encode(module: Contrastive, view: tuple[Tensor, Tensor], micro_batches: int) -> Taught:
    parts = zip(*(side.tensor_split(micro_batches) for side in view), strict=True)
    images, texts, scales = zip(*(module(*part) for part in parts), strict=True)
    return Taught(torch.cat(images), torch.cat(texts), float(scales[0]))


def find_teachers(loss: LossOptions, world: World) -> dict[str, Found]:
    """The frozen ones, by name, as rank 0 finds them. Raises ConfigError where one cannot be had."""
    names = [name for name in teachers_of(loss) if name not in (SELF, EMA)]
    return on_first(world, lambda: {name: _find(name) for name in names})


def read_teachers(config: Config, found: Mapping[str, Found], bundle: Bundle, world: World) -> Teachers:
    """All that `config` names, beside the student `bundle`, which no engine has taken yet."""
    frozen = on_each(world, lambda: {name: _read(name, one.place) for name, one in found.items()})
    ema = on_each(world, lambda: _copy(config, bundle)) if EMA in teachers_of(config.loss) else None
    for module in (*(one.module for one in frozen.values()), *([ema] if ema is not None else [])):
        module.precision = config.job.precision
        module.to(world.device).requires_grad_(False).eval()
    return Teachers(ema, config.loss.ema_decay, frozen, found)


def _copy(config: Config, bundle: Bundle) -> Contrastive:
    """The towers built again: what torch.compile made of the student's would compute with the student's weights."""
    module = towers.build(config.model, tuple, files=bundle.files).module
    module.load_state_dict(bundle.module.state_dict())
    return module


def _find(name: str) -> Found:
    place = _place(name)
    weights = _read(name, place).module.state_dict()
    bad = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        _refuse(name, f"is not finite: NaN or infinity in {checkpoint.name_some(bad)}")
    sha256 = _hash(weights)
    if not Path(place).is_dir() and _hash(_read(name, place, seed=1).module.state_dict()) != sha256:
        _refuse(name, "begins with random weights, in one tower at least")
    return Found(place, sha256)


def _place(name: str) -> str:
    """A run's folder is settled to its newest good checkpoint."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.partition(":")[0] not in (*towers.LIBRARIES, "python"):
            _refuse(name, "is no folder")
        return name
    try:
        if checkpoint.has_any(folder):
            return str(checkpoint.find(folder))
        problem = checkpoint.why_broken(folder)
    except checkpoint.CheckpointError as error:
        _refuse(name, f"cannot be used ({error})")
    if problem is not None:
        _refuse(name, f"holds no checkpoints, and as one itself {problem}")
    return str(folder)


def _read(name: str, place: str, seed: int = 0) -> Bundle:
    """`seed`: of what is random in it. The caller's random numbers stay as they are."""
    if Path(place).is_dir():
        return checkpoint.read_bundle(Path(place))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return towers.build(ModelOptions(towers=place), tuple)
        except ConfigError as error:
            _refuse(name, f"cannot be made ({error})")


def _refuse(name: str, why: str) -> NoReturn:
    raise ConfigError(
        f"loss.teachers: {name!r} {why}; allowed: {SELF!r}, {EMA!r}, the folder of a run or of one of its checkpoints, "
        f"or a form of model.towers whose weights lie in files, such as open_clip:NAME:FILE or hf:FOLDER"
    )


def _hash(weights: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
