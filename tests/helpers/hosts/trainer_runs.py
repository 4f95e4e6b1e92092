"""transformers' own Trainer on handwritten digits, with its CLIPModel and with ours; and a loop of accelerate's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from helpers.hosts import digits, on_cpu

on_cpu.prepare()  # before the host

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader, SequentialSampler  # noqa: E402
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments  # noqa: E402

from softclip_kernels import ProgressiveSelfDistillation, schedules, softclip_loss  # noqa: E402
from softclip_kernels.integrations.transformers import (  # noqa: E402
    SoftClipModelMixin,
    SoftClipTrainerMixin,
)

from .recording import Recorder  # noqa: E402

STEPS = 20
BATCH = 32  # pairs of all ranks between two steps of the optimizer
LENGTH = 8  # tokens of a caption
ROWS = BATCH * STEPS
PSD = ProgressiveSelfDistillation(schedules.Linear(0.0, 0.8, STEPS))


class CLIP(SoftClipModelMixin, CLIPModel):
    """Ours."""


class InOrder:
    """Takes the pairs in order, so that a step sees the same ones whatever the number of processes; keeps losses."""

    train_dataset: Any

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *arguments: Any) -> Tensor:
        loss = super().training_step(*arguments)  # type: ignore[misc]
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


class Hosts(InOrder, Trainer):
    """The host's."""


class Ours(InOrder, SoftClipTrainerMixin, Trainer):
    """Ours."""


def config(kind: Any = CLIPConfig, **options: Any) -> Any:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return kind(
        text_config={**small, "vocab_size": 64, "max_position_embeddings": LENGTH, **ends, **options},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )


def model_of(kind: Any = CLIPModel) -> Any:
    torch.manual_seed(0)
    return kind(config())


def pairs(rows: int = ROWS, **columns: Any) -> list[dict[str, Any]]:
    """Pictures and captions as the model takes them, and whatever columns besides (lists of numbers)."""
    pictures = torch.from_numpy(digits.images(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1
    told = [caption.split() for caption in digits.captions(rows)]
    words = sorted({word for caption in told for word in caption})
    found = []
    for row, (picture, caption) in enumerate(zip(pictures, told, strict=True)):
        tokens = [1, *(3 + words.index(word) for word in caption), 2]
        tokens += [0] * (LENGTH - len(tokens))
        item = {"pixel_values": picture, "input_ids": tokens, "attention_mask": [int(token > 0) for token in tokens]}
        found.append(item | {name: column[row] for name, column in columns.items()})
    return found


def collate(items: list[dict[str, Any]], return_loss: bool = True) -> dict[str, Any]:
    """With what the host's own loss wants."""
    batch = {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
    return batch | ({"return_loss": True} if return_loss else {})


def forget_ranks() -> None:
    """What accelerate keeps for a process, so that the next run finds its ranks and its options anew."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def settings(folder: Any, batch: int, **options: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "use_cpu": True,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(output_dir=str(folder), **(chosen | options))


def run(
    ours: bool = True,
    accumulation: int = 1,
    adamw: bool = False,
    psd: bool = False,
    columns: dict[str, Any] | None = None,
    batch: int = BATCH,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trainer.train on this rank. `batch`: pairs of all ranks in a step. `arguments`: further TrainingArguments;
    `options`: of Ours. The fields of a Recording, and for which (step, n) a target was asked."""
    forget_ranks()
    world = dist.get_world_size() if dist.is_initialized() else 1
    asked: list[tuple[int, int]] = []
    if psd:
        options["target"] = lambda step, n: asked.append((step, n)) or PSD.at(step, n)
    with tempfile.TemporaryDirectory() as folder:
        more = {"gradient_accumulation_steps": accumulation} | (arguments or {})
        chosen = settings(folder, batch // world // accumulation, **more)
        model = model_of(CLIP if ours else CLIPModel)
        adam, sgd = torch.optim.AdamW, torch.optim.SGD
        optimizer = adam(model.parameters()) if adamw else sgd(model.parameters(), lr=0.05, momentum=0.9)
        trainer = (Ours if ours else Hosts)(
            model=model,
            args=chosen,
            train_dataset=pairs(**(columns or {})),
            data_collator=collate,
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
            **options,
        )
        with Recorder(model.named_parameters) as recording:
            trainer.train()
        recording.losses = trainer.losses
    forget_ranks()
    return {"recording": vars(recording), "asked": asked, "global_step": trainer.state.global_step}


def run_accelerate(accumulation: int) -> dict[str, Any]:
    """accelerate's own loop, as docs/integrations.md has it."""
    forget_ranks()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    size = BATCH // accelerator.num_processes // accumulation
    loader = DataLoader(pairs(), size, collate_fn=lambda items: collate(items, return_loss=False))  # type: ignore
    model = model_of(CLIP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inner = model
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    with Recorder(inner.named_parameters) as recording:
        for batch in loader:
            with accelerator.accumulate(model):
                outputs = model(**batch)
                loss = softclip_loss(*outputs.values(), group="world")
                accelerator.backward(loss)
                losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
    # AcceleratedOptimizer skips the steps between; the hook sees true ones alone.
    recording.losses = losses
    forget_ranks()
    return {"recording": vars(recording), "asked": [], "global_step": recording.steps}


def exact_gradients(accumulation: int = 1) -> dict[str, Tensor]:
    """Of the host's own loss in float64, in one process: the mean over the first step's batches."""
    model, rows, size = model_of().double(), pairs(BATCH), BATCH // accumulation
    for begin in range(0, BATCH, size):
        batch = collate(rows[begin : begin + size])
        batch["pixel_values"] = batch["pixel_values"].double()
        (model(**batch).loss / accumulation).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def evaluate(kind: Any, model: Any, folder: Any, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
    """A trainer of either kind that has something to evaluate."""
    chosen = settings(folder, 8, per_device_eval_batch_size=16, **(arguments or {}))
    return kind(model=model, args=chosen, **({"eval_dataset": pairs(40), "data_collator": collate} | options))


def over_ranks(folder: Path) -> dict[str, Any]:
    """Everything that the tests ask of two processes."""
    return {
        "one": run(),
        "accumulated": run(accumulation=4),
        "psd": run(accumulation=4, psd=True, arguments={"max_steps": 5}),
        "two passes": run(accumulation=2, micro_batches=3, arguments={"max_steps": 5}),
        "accelerate": run_accelerate(1),
        "accelerate, accumulated": run_accelerate(4),
    }
