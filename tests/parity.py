"""Training one model with different ways of computing one loss, and the rule by which their runs count as the same.

The losses differ by rounding alone, and training magnifies that: Adam divides a gradient by its own size, so an entry
that is all rounding moves its parameter as far as any other. How far two runs may come apart is therefore measured, not
guessed: by `CONTROLS`, runs with the dense loss itself, in float32, on operands that were rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from train_data import make_data, tiny

from softclip_kernels import Target, softclip_loss
from softclip_kernels.testing import dense_loss
from train import evaluate
from train.config import Config
from train.data import Pairs, load_pairs
from train.model import MAX_LOG_SCALE, Clip
from train.samples import Sampler, all_captions
from train.step import target_at
from train.tokenizer import train_tokenizer

CPU = torch.device("cpu")
LossFunction = Callable[[Tensor, Tensor, Tensor, Target], Tensor]


@dataclass(frozen=True)
class Problem:
    """What is trained on what; `held_out`: the splits by which retrieval is judged."""

    config: Config
    sampler: Sampler
    tokenizer: Tokenizer
    held_out: dict[str, Pairs]


@dataclass
class Run:
    """What training left: of every step the loss, the gradient's norm and the scale; the parameters; R@1 by split."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    parameters: Tensor = field(default_factory=lambda: torch.empty(0))
    recalls: dict[str, float] = field(default_factory=dict)


def problem(folder: Path, target: str, steps: int, batch: int = 96) -> Problem:
    data = make_data(folder, concepts=2 * batch)
    sections = tiny(data)
    sections["optimizer"] = {"steps": steps, "batch_size": batch, "warmup_steps": steps // 10, "lr": 3e-3}
    sections["loss"] = {"target": target, "hard_steps": steps // 5, "rise_steps": steps // 2, "alpha_end": 0.5}
    config = Config.from_dict(sections)
    pairs = load_pairs(data, "train")
    tokenizer = train_tokenizer(all_captions(pairs), config.model.vocab_size)
    sampler = Sampler(pairs, tokenizer, config.model.context_length, batch, config.job.seed)
    return Problem(config, sampler, tokenizer, {name: load_pairs(data, name) for name in ("heldout", "vendor")})


def train(problem: Problem, loss_of: LossFunction) -> Run:
    """The trainer's model, batches, target, optimizer and schedules, in this process; the loss is `loss_of`."""
    config, run = problem.config, Run()
    torch.manual_seed(config.job.seed)
    model = Clip(config.model, problem.tokenizer.get_vocab_size())
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameter_groups(options.weight_decay), betas=(options.betas[0], options.betas[1])
    )
    for step in range(options.steps):
        for settings in optimizer.param_groups:
            settings["lr"] = options.lr_at(step)
        batch = problem.sampler.share(step, 0, 1, CPU)
        x, y, scale = model(batch.images, batch.tokens)
        target = target_at(step, options.batch_size, config.loss, config.job.seed)
        loss = loss_of(x, y, scale, target)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            model.log_scale.clamp_(max=MAX_LOG_SCALE)
        run.losses.append(loss.item())
        run.grad_norms.append(norm.item())
        run.scales.append(scale.item())
    run.parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    for name, pairs in problem.held_out.items():
        ways = evaluate.retrieve(model, problem.tokenizer, pairs, evaluate.embed_images(model, pairs.images))
        run.recalls |= {f"{name} {i}": way.recall[1] for i, way in enumerate(ways)}
    return run


def fused(backend: str) -> LossFunction:
    return partial(_fused, backend)


def _fused(backend: str, x: Tensor, y: Tensor, scale: Tensor, target: Target) -> Tensor:
    return softclip_loss(x, y, scale, target, backend=backend)


def exact(x: Tensor, y: Tensor, scale: Tensor, target: Target) -> Tensor:
    """The dense loss in float64."""
    return dense_loss(x.double(), y.double(), scale.double(), target)
