"""A training loop for every host that has an adapter: the host's own, with its loss or ours in it, and towers so small
that the loss is what a step consists of. Embeddings of width D, float32, one process, SGD.

Each is `loop(loss, n, folder)`: STEPS steps of n rows. `loss` is "host", "softclip_kernels" or "softclip_kernels PSD",
for which half of the pairs are taught by the model itself.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softclip_kernels import ProgressiveSelfDistillation, schedules

STEPS = 4
D = 512
RATE = 0.05
HOST, OURS, PSD = "host", "softclip_kernels", "softclip_kernels PSD"
PAIRS = (HOST, OURS, PSD)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ARGUMENTS: dict[str, Any] = {  # of the two trainers that are transformers' own
    "max_steps": STEPS,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}
distillation = ProgressiveSelfDistillation(schedules.Constant(0.5))


@dataclass(frozen=True)
class Loop:
    """A host's loop, `module` of which must be there to run it; its own loss, as the host calls it; and what runs."""

    name: str
    module: str
    own: str
    run: Callable[[str, int, Path], None]
    losses: tuple[str, ...] = (HOST, OURS)


def open_clip(loss: str, n: int, folder: Path) -> None:
    """open_clip_train's main on handwritten digits, each read from its file."""
    import open_clip
    import open_clip_train.main
    from PIL import Image
    from sklearn.datasets import load_digits

    from softclip_kernels.integrations import open_clip as adapter

    tiny = {
        "embed_dim": D,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
    }
    (folder / "tiny.json").write_text(json.dumps(tiny))
    open_clip.add_model_config(folder / "tiny.json")
    digits = load_digits()
    for k, picture in enumerate(digits.images):
        Image.fromarray((picture * 15).astype("uint8")).save(folder / f"{k}.png")
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(("filepath", "title"))
        for row in range(STEPS * n):
            k = row % len(digits.images)
            table.writerow((folder / f"{k}.png", f"a {WORDS[digits.target[k]]}"))
    if loss != HOST:
        adapter.install(distillation.at if loss == PSD else None)
    flags = (
        *("--train-data", str(folder / "pairs.csv"), "--dataset-type", "csv", "--model", "tiny", "--device", "cpu"),
        *("--batch-size", str(n), "--epochs", "1", "--workers", "0", "--precision", "fp32", "--warmup", "0"),
        *("--opt", "timm/sgd", "--lr", str(RATE), "--lr-scheduler", "const", "--save-frequency", "0"),
        *("--force-image-size", "16", "--logs", str(folder / "logs"), "--name", "run"),
    )
    open_clip_train.main.main(flags)


def transformers(loss: str, n: int, folder: Path) -> None:
    """The Trainer, with a CLIPModel of one layer a tower."""
    from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

    from softclip_kernels.integrations.transformers import SoftClipModelMixin, SoftClipTrainerMixin

    class Clip(SoftClipModelMixin, CLIPModel):
        pass

    class ClipTrainer(SoftClipTrainerMixin, Trainer):
        pass

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
        | {"pad_token_id": 0},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=D,
    )
    pixels = torch.randn(STEPS * n, 3, 8, 8)
    tokens = F.pad(torch.randint(3, 64, (STEPS * n, 6)), (1, 0), value=1)
    data = [{"pixel_values": a, "input_ids": b} for a, b in zip(pixels, F.pad(tokens, (0, 1), value=2), strict=True)]

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]} | {"return_loss": True}

    model = (CLIPModel if loss == HOST else Clip)(config)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=n, **ARGUMENTS)
    options: dict[str, Any] = {"target": distillation.at} if loss == PSD else {}
    (Trainer if loss == HOST else ClipTrainer)(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        **options,
    ).train()


def lightning(loss: str, n: int, folder: Path) -> None:
    """Lightning's Trainer, with a linear layer a tower."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    from softclip_kernels.integrations.lightning import SoftClipMixin

    class Towers(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Linear(64, D), nn.Linear(64, D)
            self.log_scale = nn.Parameter(torch.tensor(2.66))

        def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return (
                F.normalize(self.image(images), dim=1),
                F.normalize(self.text(texts), dim=1),
                self.log_scale.exp(),
            )

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y, scale = self(*batch)
            z, own = scale * x @ y.T, torch.arange(len(x))
            return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), RATE)

    class Ours(SoftClipMixin, Towers):
        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y, scale = self(*batch)
            return self.softclip_loss(x, y, scale, distillation.at if loss == PSD else None)

    images = torch.randn(STEPS * n, 64)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(images, images + torch.randn(STEPS * n, 64))
    trainer.fit(Towers() if loss == HOST else Ours(), DataLoader(data, n))


def sentence_transformers(loss: str, n: int, folder: Path) -> None:
    """Its trainer, with StaticEmbedding: the mean of a sentence's word vectors. Documents are the queries' words in
    another order, without two of them."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from softclip_kernels.integrations.sentence_transformers import SoftClipMultipleNegativesRankingLoss

    chance = random.Random(0)
    words = [f"w{k}" for k in range(1000)]
    queries = [chance.sample(words, 8) for _ in range(STEPS * n)]
    data = Dataset.from_dict(
        {"anchor": [" ".join(query) for query in queries], "positive": [" ".join(query[:1:-1]) for query in queries]}
    )
    tokenizer = Tokenizer(WordLevel({word: k for k, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=D)], device="cpu")
    kind = MultipleNegativesRankingLoss if loss == HOST else SoftClipMultipleNegativesRankingLoss
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    arguments = SentenceTransformerTrainingArguments(str(folder), per_device_train_batch_size=n, **ARGUMENTS)
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        loss=kind(model),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    ).train()


def pytorch_metric_learning(loss: str, n: int, folder: Path) -> None:
    """Of two tensors it has no loop of its own: a few lines of PyTorch, a linear layer, ten classes."""
    from pytorch_metric_learning.losses import SupConLoss

    from softclip_kernels.integrations.pytorch_metric_learning import SoftClipSupConLoss

    tower = nn.Linear(64, D)
    criterion = (SupConLoss if loss == HOST else SoftClipSupConLoss)(temperature=0.07)
    optimizer = torch.optim.SGD(tower.parameters(), RATE)
    for _ in range(STEPS):
        views, labels = torch.randn(n, 64), torch.randint(0, 10, (n,))
        optimizer.zero_grad()
        criterion(tower(views), labels, None, tower(views + torch.randn(n, 64)), labels.clone()).backward()
        optimizer.step()


LOOPS = (
    Loop("open_clip", "open_clip_train", "ClipLoss", open_clip, PAIRS),
    Loop("transformers", "transformers", "CLIPModel with return_loss", transformers, PAIRS),
    Loop("Lightning", "lightning", "the dense loss", lightning, PAIRS),
    Loop("sentence-transformers", "sentence_transformers", "MultipleNegativesRankingLoss", sentence_transformers),
    Loop("pytorch-metric-learning", "pytorch_metric_learning", "SupConLoss", pytorch_metric_learning),
)
