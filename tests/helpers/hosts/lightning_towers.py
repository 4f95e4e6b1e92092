"""Lightning's own trainer on digits and their captions: small towers, every way to train them, and runs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from softclip_kernels import ProgressiveSelfDistillation, Target, schedules, split_batch
from softclip_kernels.distributed.whole import full
from softclip_kernels.integrations.lightning import SoftClipMixin

from . import digits
from .recording import Recorder

BATCH = 8
PSD = ProgressiveSelfDistillation(schedules.Linear(0.5, 1.0, steps=20))


def data(count: int) -> TensorDataset:
    """Pixels (count, 64), and the captions' words (count, words)."""
    told = [re.findall(r"\w+", caption) for caption in digits.captions(count)]
    words = sorted({word for caption in told for word in caption})
    bags = torch.tensor([[float(word in caption) for word in words] for caption in told])
    pixels = torch.from_numpy(digits.images(count, size=8)[..., 0]).flatten(1) / 255 - 0.5
    return TensorDataset(pixels, bags)


class Towers(pl.LightningModule):
    """Trained by the dense loss of everybody's embeddings, gathered with their gradients: the host's right variant."""

    def __init__(self, words: int, adamw: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16))
        self.text = nn.Sequential(nn.Linear(words, 32), nn.Tanh(), nn.Linear(32, 16))
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.adamw = adamw
        self.met: list[Any] = []
        self.logged: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.backward_hooks = 0

    def forward(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(pixels), dim=1), F.normalize(self.text(words), dim=1), self.log_scale.exp()

    def loss(self, batch: Any) -> Tensor:
        x, y, scale = self(*batch)
        if self.trainer.world_size > 1:
            x, y = (self.all_gather(each, sync_grads=True).flatten(0, 1) for each in (x, y))
        z, own = scale * x @ y.T, torch.arange(len(x))
        loss = (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2
        self.log("loss", loss.detach(), batch_size=len(x))
        return loss

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        self.met.append(batch)
        return self.loss(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.logged.append(self.trainer.callback_metrics["loss"].item())

    def on_before_backward(self, loss: Tensor) -> None:
        self.backward_hooks += 1

    def on_after_backward(self) -> None:
        self.backward_hooks += 1

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Where gradients are whole: in automatic optimization, the optimizer's step is what makes them."""
        if not self.gradients:
            self.gradients = {name: full(each.grad).clone() for name, each in self.named_parameters()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adamw:
            return torch.optim.AdamW(self.parameters(), 1e-3)
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Ours(SoftClipMixin, Towers):
    target: Any = None

    def loss(self, batch: Any) -> Tensor:
        return self.softclip_loss(*self(*batch), self.target)


class TwoPasses(Ours):
    """In manual optimization, three micro-batches of 3, 3 and 2 rows."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        passes = self.two_pass(split_batch(batch, size=3))
        loss = self.softclip_loss(*passes.outputs, self.target)
        self.two_pass_backward(passes, loss)
        optimizer.step()
        return loss


class Shards(pl.LightningModule):
    """FSDP2, which ModelParallelStrategy asks configure_model for."""

    def configure_model(self) -> None:
        for module in self.sharded():
            fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def sharded(self) -> list[nn.Module]:
        return [self.image, self.text, self]


class ShardedOurs(Shards, Ours):
    pass


class ShardedTwoPasses(Shards, TwoPasses):
    pass


class ShardedTowersAlone(Shards, Ours):
    """Nobody averages the scale's gradient."""

    def sharded(self) -> list[nn.Module]:
        return [self.image, self.text]


class ShardedNothing(Shards, Ours):
    """The mesh alone says that ranks share their rows."""

    def sharded(self) -> list[nn.Module]:
        return []


def refusal(kind: type[Towers], **sizes: int) -> str:
    try:
        train(kind, ModelParallelStrategy(**sizes), steps=1)
    except ValueError as error:
        return str(error)
    return "not refused"


def train(
    kind: type[Towers],
    strategy: Any = None,
    *,
    accumulation: int = 1,
    steps: int = 20,
    target: Any = None,
    adamw: bool = False,
    half: bool = False,
) -> tuple[dict[str, Any], Towers]:
    """Lightning's trainer for 20 steps; the model afterwards holds the batches it met, and what was logged. `half`:
    float16 and a scaler, in whose place `precision="16-mixed"` gives bfloat16 on a CPU."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    dataset = data(BATCH * accumulation * steps * ranks)
    model = kind(dataset.tensors[1].shape[1], adamw=adamw)
    if target is not None:
        model.target = target
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy or ("ddp" if ranks > 1 else "auto"),
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))] if half else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with Recorder(model.named_parameters) as recording:
        trainer.fit(model, DataLoader(dataset, batch_size=BATCH))
    recording.losses, recording.gradients = model.logged, model.gradients
    return vars(recording), model


def runs() -> dict[str, Any]:
    """Every case; of each, the recording, the batches that the first step met, and what was asked of a target."""
    found: dict[str, Any] = {}

    def run(name: str, kind: type[Towers], *strategy: Any, **options: Any) -> None:
        recording, model = train(kind, *strategy, **options)
        found[name] = {
            "recording": recording,
            "met": model.met[: options.get("accumulation", 1)],
            "steps": model.trainer.global_step,
            "backward hooks": model.backward_hooks,
        }

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    run("host", Towers)
    run("host, accumulated", Towers, accumulation=4)
    run("host, AdamW", Towers, adamw=True)
    run("ours", Ours)
    run("ours, accumulated", Ours, accumulation=4)
    run("ours, AdamW", Ours, adamw=True)
    run("two passes", TwoPasses)
    run("ours, float16", Ours, half=True)
    run("two passes, float16", TwoPasses, half=True)
    for name, kind, options in (("ours", Ours, {"accumulation": 4}), ("two passes", TwoPasses, {})):
        asked: list[tuple[int, int]] = []

        def at(step: int, n: int, asked: list[tuple[int, int]] = asked) -> Target:
            asked.append((step, n))
            return PSD.at(step, n)

        run(f"{name}, psd", kind, target=at, steps=6, **options)
        found[f"{name}, psd"]["asked"] = asked
    if ranks > 1:
        run("two passes, unused", TwoPasses, "ddp_find_unused_parameters_true")
        run("two passes, views", TwoPasses, DDPStrategy(gradient_as_bucket_view=True))
        run("two passes, static", TwoPasses, DDPStrategy(static_graph=True))
        for name, kind in (("ours", ShardedOurs), ("two passes", ShardedTwoPasses)):
            run(f"{name}, fsdp2", kind, ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1))
        found["refused"] = {
            "unsharded": refusal(ShardedTowersAlone, data_parallel_size=ranks, tensor_parallel_size=1),
            "shared": refusal(ShardedNothing, data_parallel_size=1, tensor_parallel_size=ranks),
        }
    return found


def over_ranks(folder: Path) -> dict[str, Any]:
    return runs()
