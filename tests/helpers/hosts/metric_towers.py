"""Two small towers under pytorch-metric-learning's losses of two tensors, or under ours, as the host's users train
them: it has no loop of its own for two tensors. Over ranks its DistributedLossWrapper gathers both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softclip_kernels import Hard, Weighted
from softclip_kernels.integrations import pytorch_metric_learning as adapter
from softclip_kernels.testing import dense_loss

from . import digits
from .recording import Recorder, Recording

HOST = {"NTXent": losses.NTXentLoss, "SupCon": losses.SupConLoss}
OURS = {"NTXent": adapter.SoftClipNTXentLoss, "SupCon": adapter.SoftClipSupConLoss}
BATCH, STEPS, TEMPERATURE = 16, 20, 0.2


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.words = nn.Linear(64, 16), nn.EmbeddingBag(128, 16)

    def forward(self, pixels: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(pixels), self.words(letters)


def batches(kind: str, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of BATCH digits: pixels, their captions' letters, and labels: SupCon's are the digits' classes, of NTXent each
    pair is one of its own."""
    total = BATCH * count
    pixels = torch.from_numpy(digits.images(total, size=8)[..., 0]).flatten(1) / 255 - 0.5
    letters = torch.tensor([[ord(letter) for letter in caption.ljust(48)[:48]] for caption in digits.captions(total)])
    labels = torch.tensor(digits.classes(total)) if kind == "SupCon" else torch.arange(total)
    return list(zip(pixels.split(BATCH), letters.split(BATCH), labels.split(BATCH), strict=True))


def train(loss: Any, kind: str, accumulation: int = 1, adamw: bool = False) -> Recording:
    """STEPS steps, each rank with its share of every batch."""
    model = inner = Towers()
    rank, ranks = 0, 1
    if dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
        model, loss = DistributedDataParallel(inner), DistributedLossWrapper(loss)
    parameters = list(inner.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-3) if adamw else torch.optim.SGD(parameters, 0.05, momentum=0.9)
    with Recorder(inner.named_parameters) as recording:
        for index, batch in enumerate(batches(kind, STEPS * accumulation), start=1):
            pixels, letters, labels = (each.chunk(ranks)[rank] for each in batch)
            x, y = model(pixels, letters)
            value = loss(x, labels, ref_emb=y, ref_labels=labels.clone())
            recording.losses.append(value.item() / ranks)  # the wrapper's is as many times the loss
            (value / accumulation).backward()
            if index % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
    return recording


def exact_gradients(kind: str, accumulation: int) -> dict[str, Tensor]:
    """The first step's, in float64 and one process, of the dense loss."""
    model = Towers().double()
    for pixels, letters, labels in batches(kind, accumulation):
        x, y = (nn.functional.normalize(each, dim=1) for each in model(pixels.double(), letters))
        target = Weighted(Hard(groups=(labels, labels)), (2.0, 0.0))
        (dense_loss(x, y, torch.tensor(1 / TEMPERATURE, dtype=torch.float64), target) / accumulation).backward()
    return {name: each.grad for name, each in model.named_parameters()}


def over_ranks(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    return {
        (kind, whose, accumulation): vars(train(made[kind](temperature=TEMPERATURE), kind, accumulation))
        for whose, made in (("host", HOST), ("ours", OURS))
        for kind in made
        for accumulation in (1, 4)
    }
