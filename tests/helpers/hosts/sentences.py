"""sentence-transformers' own trainer on sentences about numpy: a tiny BERT, columns of every layout, and runs."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from softclip_kernels import EachStep, ProgressiveSelfDistillation, schedules
from softclip_kernels.integrations.sentence_transformers import (
    SoftClipCachedMultipleNegativesRankingLoss,
    SoftClipMultipleNegativesRankingLoss,
)
from softclip_kernels.targets.base import Target

from .digits import sentence_pairs
from .recording import Recorder, Recording

HOST = {False: MultipleNegativesRankingLoss, True: CachedMultipleNegativesRankingLoss}
OURS = {False: SoftClipMultipleNegativesRankingLoss, True: SoftClipCachedMultipleNegativesRankingLoss}
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def write_model(folder: Path) -> Path:
    """A BERT of random weights, with the sentences' words as its vocabulary and without dropout."""
    words = sorted({word for pair in sentence_pairs(300) for word in re.findall(r"\w+", " ".join(pair).lower())})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: k for k, word in enumerate([*special, *words])}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=128,
        initializer_range=0.2,  # else all sentences are alike, and gradients little but rounding
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return folder


@functools.cache
def _made(folder: Path) -> SentenceTransformer:
    words = Transformer(str(folder), max_seq_length=64)
    return SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())], device="cpu")


def make_model(folder: Path) -> SentenceTransformer:
    return copy.deepcopy(_made(folder))


def data(columns: int, rows: int) -> Dataset:
    """anchor, positive, and columns - 2 of negatives: documents of other rows."""
    pairs = sentence_pairs(rows)
    table = {
        "anchor": [anchor.removeprefix("what does ").removesuffix(" do") for anchor, _ in pairs],
        "positive": [document for _, document in pairs],
    }
    for k in range(columns - 2):
        table[f"negative_{k}"] = [pairs[(row + 17 * (k + 1)) % rows][1] for row in range(rows)]
    return Dataset.from_dict(table)


Features = list[dict[str, Tensor]]


def train(
    folder: Path,
    make_loss: Callable[[SentenceTransformer], torch.nn.Module],
    *,
    columns: int = 2,
    batch: int = 8,
    accumulation: int = 1,
    steps: int = 20,
    adamw: bool = False,
    trainers: list[SentenceTransformerTrainer] | None = None,
) -> tuple[Recording, list[Features], SentenceTransformerTrainer]:
    """The host's trainer for 20 steps; what it did, and the columns that the loss met before the first step.
    The trainer is also put into `trainers`, for a loss that asks it for its step."""
    model = make_model(folder)
    met: list[Features] = []
    loss = make_loss(model)
    loss.register_forward_pre_hook(lambda _, inputs: met.append([dict(one) for one in inputs[0]]))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-3) if adamw else torch.optim.SGD(parameters, 0.01, momentum=0.9)
    settings = SentenceTransformerTrainingArguments(
        str(folder / "runs"),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=24 // (dist.get_world_size() if dist.is_initialized() else 1),
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    dataset = data(columns, 192)  # whole steps an epoch, for one rank and for two
    trainer = SentenceTransformerTrainer(
        model, settings, train_dataset=dataset, eval_dataset=dataset.select(range(24)), loss=loss,
        optimizers=(optimizer, None),
    )  # fmt: skip
    if trainers is not None:
        trainers.append(trainer)
    with Recorder(model.named_parameters) as recording:
        trainer.train()
    recording.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return recording, met[:accumulation], trainer


def joined(shares: list[Features]) -> Features:
    """The columns of several ranks as those of one batch."""
    together = []
    for column in zip(*shares, strict=True):
        width = max(one["input_ids"].shape[1] for one in column)
        together.append({
            name: torch.cat([
                torch.nn.functional.pad(one[name], (0, width - one[name].shape[1])) for one in column
            ])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        })  # fmt: skip
    return together


def exact_gradients(folder: Path, met: list[Features], **options: Any) -> dict[str, Tensor]:
    """In float64 and one process, of the mean over micro-batches of the host's loss."""
    model = make_model(folder).double()
    for features in met:
        loss = MultipleNegativesRankingLoss(model, **options)([dict(column) for column in features], None)
        (loss / len(met)).backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


# columns, options, micro-batches of a step, whether cached
CASES: dict[str, tuple[int, dict[str, Any], int, bool]] = {
    "pairs": (2, {}, 1, False),
    "triplets, accumulated": (3, {"scale": 13.5}, 4, False),
    "two negatives, both directions": (4, BOTH, 1, False),
    "cached, both directions": (3, BOTH, 1, True),
}
PSD_STEPS = 6


def runs(folder: Path, gather: bool) -> dict[str, Any]:
    """Every case with the host's loss and with ours, and one with progressive self-distillation."""
    found: dict[str, Any] = {}
    for name, (columns, options, accumulation, cached) in CASES.items():
        given = {**options, "gather_across_devices": gather, **({"mini_batch_size": 5} if cached else {})}
        for whose, losses in (("host", HOST), ("ours", OURS)):
            recording, met, _ = train(
                folder, lambda model, make=losses[cached], given=given: make(model, **given), columns=columns,
                accumulation=accumulation,
            )  # fmt: skip
            found[name, whose] = (vars(recording), met)
    asked, psd = [], ProgressiveSelfDistillation(schedules.Linear(0.5, 1.0, steps=PSD_STEPS))

    def at(step: int, n: int) -> Target:
        asked.append((step, n))
        return psd.at(step, n)

    def make(model: SentenceTransformer) -> torch.nn.Module:
        target = EachStep(at, lambda: trainers[-1].state.global_step)
        return SoftClipMultipleNegativesRankingLoss(model, gather_across_devices=gather, target=target, **BOTH)

    trainers: list[SentenceTransformerTrainer] = []
    recording, met, trainer = train(folder, make, accumulation=4, steps=PSD_STEPS, trainers=trainers)
    found["psd"] = (vars(recording), met, asked, trainer.evaluate()["eval_loss"])
    return found


def uneven(rank: int) -> dict[str, Any]:
    """Shares of 3 and 5 queries, with two negatives each, in both directions: a rank's loss and its gradients."""
    columns = [one.requires_grad_() for one in share(rank)]
    loss = SoftClipMultipleNegativesRankingLoss(nn.Identity(), gather_across_devices=True, **BOTH)
    value = loss.compute_loss_from_embeddings(columns, None)
    value.backward()
    return {"loss": value.detach(), "gradients": [one.grad for one in columns]}


def share(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 16, generator=generator).split((3, 5))[rank].clone() for _ in range(4)]


def over_ranks(folder: Path) -> dict[str, Any]:
    return {"runs": runs(folder, gather=True), "uneven": uneven(dist.get_rank())}
