"""Two tiny towers in a DeepSpeed engine, their batches, and the plain PyTorch loop that training must equal. Functions
that take a group run in a rank of helpers.ranks.Pool."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.towers import import_deepspeed
from softclip_kernels.testing import dense_loss
from train.config import Config
from train.options import ModelOptions
from train.towers.bundle import Bundle
from train.towers.contrastive import MAX_LOG_SCALE, Contrastive

PAIRS = 16
# Every way that DeepSpeed holds parameters and state.
KINDS: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "1 offload": {"zero_stage": 1, "offload_optimizer": True},
    "2": {"zero_stage": 2},
    "2 offload": {"zero_stage": 2, "offload_optimizer": True},
    "3": {"zero_stage": 3},
    "3 offload": {"zero_stage": 3, "offload_optimizer": True},
    "3 offload parameters": {"zero_stage": 3, "offload_parameters": True},
    "3 offload both": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


class TinyTowers(Contrastive):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, width))
        self.text = nn.Sequential(nn.Embedding(11, 20), nn.Flatten(), nn.Linear(60, width))
        self.log_scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("mean", torch.tensor([0.1]))

    def encode_images(self, images: Tensor) -> Tensor:
        return self.image(images - self.mean)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        return self.text(tokens)


@dataclass(frozen=True)
class Share:
    images: Tensor
    tokens: Tensor
    bad: dict[str, int]
    labels: Tensor
    noise: Tensor
    views: tuple[tuple[Tensor, Tensor], ...] = ()


def bundle(seed: int = 0, lock: str = "none", precision: str = "fp32") -> Bundle:
    """The image tower learns half as fast, nothing of the text tower decays, and the scale's group has fewer elements
    than there are ranks."""
    torch.manual_seed(seed)
    towers = TinyTowers()
    towers.precision = precision
    if lock != "none":
        getattr(towers, lock).requires_grad_(False)

    def parameter_groups(weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        trained = {name: one for name, one in towers.named_parameters() if one.requires_grad}
        images, texts = ([one for name, one in trained.items() if name.startswith(side)] for side in ("image", "text"))
        scale = [one for name, one in trained.items() if name == "log_scale"]
        groups: list[dict[str, Any]] = [
            {"params": images, "weight_decay": weight_decay, "lr_scale": 0.5},
            {"params": texts, "weight_decay": 0.0},
            {"params": scale, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    return Bundle(towers, None, None, 8, 7, parameter_groups)  # type: ignore[arg-type]


def tiny(options: ModelOptions) -> Bundle:
    """The factory of TOWERS."""
    return bundle()


def narrow(options: ModelOptions) -> Bundle:
    """Of NARROW_TOWERS, in which a teacher may be of another width."""
    torch.manual_seed(7)
    return Bundle(TinyTowers(width=6), None, None, 6, 7, None)  # type: ignore[arg-type]


def drawn(options: ModelOptions) -> Bundle:
    """Of RANDOM_TOWERS."""
    return Bundle(TinyTowers(), None, None, 8, 7, None)  # type: ignore[arg-type]


TOWERS, NARROW_TOWERS, RANDOM_TOWERS = (f"python:helpers.engines:{name}" for name in ("tiny", "narrow", "drawn"))


def config(kind: str, precision: str = "fp32", deepspeed: dict[str, Any] | None = None, **optimizer: Any) -> Config:
    """Under ZeRO-3 no parameter is so small that every rank keeps it whole, as DeepSpeed else has it."""
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if kind.startswith("3") else {}
    options = {"batch_size": PAIRS, "steps": 20, "warmup_steps": 2, "lr": 1e-2, "eps": 1e-4, "max_grad_norm": 2.0}
    return Config.from_dict(
        {
            "optimizer": {**options, **optimizer},
            "model": {"towers": TOWERS},
            "loss": {"hard_steps": 1, "rise_steps": 3, "alpha_end": 0.5},
            "job": {"device": "cpu", "precision": precision, **KINDS[kind]},
            "deepspeed": deepspeed or zero,
        }
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Of all ranks: (PAIRS, 3, 2, 2), (PAIRS, 3)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(PAIRS, 3, 2, 2, generator=generator), torch.randint(0, 11, (PAIRS, 3), generator=generator)


def labels(step: int) -> Tensor:
    """Of all ranks, (PAIRS,): some of them have the same."""
    return torch.randint(0, 9, (PAIRS,), generator=torch.Generator().manual_seed(step))


def view(step: int) -> tuple[Tensor, Tensor]:
    """The batch as a frozen teacher takes it."""
    images, tokens = batch(step)
    return images.flip(3), tokens.flip(1)


def share(step: int, rank: int, ranks: int, teachers: int = 0) -> Share:
    """`teachers`: how many frozen ones there are."""
    whole = (*batch(step), labels(step), *view(step))
    images, tokens, numbers, *seen = (one.tensor_split(ranks)[rank] for one in whole)
    return Share(images, tokens, {"broken_image": rank + 1}, numbers, 0 * numbers, ((seen[0], seen[1]),) * teachers)


def start(group: Any, config: Config, bundle: Bundle) -> Any:
    """The engine, in a rank of the pool, which is the whole job."""
    import_deepspeed(group)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from train.engine import make_engine
    from train.world import World

    return make_engine(bundle, config, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), group))


def take_step(engine: Any, step: int, config: Config, group: Any, teachers: Any = None) -> Any:
    from train.step import train_step
    from train.teachers import ALONE

    teachers = teachers or ALONE
    taken = share(step, dist.get_rank(), dist.get_world_size(), len(teachers.frozen))
    return train_step(engine, taken, step, config, group, teachers)


def teachers_of(group: Any, config: Config, bundle: Bundle) -> Any:
    from train.teachers import find_teachers, read_teachers
    from train.world import World

    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), group)
    return read_teachers(config, find_teachers(config.loss, world), bundle, world)


def weights(engine: Any) -> dict[str, Tensor]:
    from train.engine_state import gather_weights

    return gather_weights(engine)


def write_checkpoint(engine: Any, folder: Path) -> None:
    """The parts of a checkpoint that an engine goes on from."""
    from train import checkpoint
    from train.engine_state import save_engine

    save_engine(engine, folder / checkpoint.ENGINE)
    whole = weights(engine)
    if dist.get_rank() == 0:
        save_file(whole, folder / checkpoint.WEIGHTS)
    dist.barrier()


def plain_loop(config: Config, steps: int, lock: str = "none") -> tuple[dict[str, Tensor], list[float]]:
    """One process, the whole batch, the dense loss, PyTorch's optimizer: the parameters afterwards, and the losses."""
    from train.targets import target_at

    made, options = bundle(lock=lock), config.optimizer
    groups = made.parameter_groups(options.weight_decay, options.layer_decay)
    optimizer: torch.optim.Optimizer
    if options.name == "sgd":
        optimizer = torch.optim.SGD(groups, options.lr, momentum=options.betas[0])
    else:
        optimizer = torch.optim.AdamW(groups, options.lr, betas=tuple(options.betas), eps=options.eps)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr_at(step) * group.get("lr_scale", 1.0)
        x, y, scale = made.module(*batch(step))
        loss = dense_loss(x, y, scale, target_at(step, PAIRS, config.loss, config.job.seed))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(made.module.parameters(), options.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            made.module.log_scale.clamp_(max=MAX_LOG_SCALE)
        losses.append(float(loss.detach()))
    return {name: tensor.detach() for name, tensor in made.module.state_dict().items()}, losses


def assembled(folder: Path) -> dict[str, Tensor]:
    """The optimizer's state in the files of a checkpoint, whole, by parameter and key."""
    from train import checkpoint
    from train.engine_files import read

    contents = [read(path) for path in sorted((folder / checkpoint.ENGINE).iterdir())]
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for part in (part for content in contents for part in content["parts"]):
        for key, value in part["cut"].items():
            found.setdefault(f"{part['name']} {key}", []).append((part["start"], value.flatten()))
        for key, value in part["whole"].items():
            found[f"{part['name']} {key}"] = [(0, torch.as_tensor(value))]
    return {
        name: torch.cat([piece.flatten() for _, piece in sorted(pieces, key=lambda pair: pair[0])])
        for name, pieces in found.items()
    }


def groups_of(folder: Path) -> str:
    """The optimizer's groups in a checkpoint."""
    from train import checkpoint
    from train.engine_files import file_of, read

    return json.dumps(read(folder / checkpoint.ENGINE / file_of(0))["groups"], default=str)
