"""Training one model with different ways of computing one loss, and the rule by which their runs count as the same.

Two questions. Along one run, does each way give the same loss and gradient at the same parameters, at every step? That
is as sharp as float32 allows. And do runs that go their own ways arrive at the same place? That is not: the ways differ
by rounding, and training magnifies it, for Adam divides a gradient by its size, so that an entry which is all rounding
moves its parameter as far as any other. Two dense runs that differ in the order of a sum come apart as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from helpers.data import make_data, tiny
from softclip_kernels import Target, softclip_loss
from softclip_kernels.targets import ForBatch, Mix
from softclip_kernels.testing import FIELDS, Result, dense_loss
from train import towers
from train.config import Config
from train.data import TrainingData, open_training_data
from train.evaluate import evaluate_set
from train.evaluate.sets import EvaluationSet, read_evaluation
from train.evaluate.shares import ALONE
from train.targets import target_at
from train.towers.contrastive import MAX_LOG_SCALE

LossFunction = Callable[[Tensor, Tensor, Tensor, Target], Tensor]


# ------------------------------------------------------------------------------------------------ ways, right and wrong


def exact(x: Tensor, y: Tensor, scale: Tensor, target: Target) -> Tensor:
    """The dense loss in float64."""
    return dense_loss(x.double(), y.double(), scale.double(), target)


def dense_otherwise(x: Tensor, y: Tensor, scale: Tensor, target: Target) -> Tensor:
    """The dense loss in float32, its products summed backwards: the control."""
    return dense_loss(x.flip(1), y.flip(1), scale, target)


def fused(backend: str) -> LossFunction:
    return partial(softclip_loss, backend=backend)


class _Scaled(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * context.factor, None


def _softer(target: Target, factor: float) -> Target:
    """The share of the teacher in every soft row times `factor`."""
    if not (isinstance(target, ForBatch) and isinstance(target.target, Mix)):
        return target
    assert isinstance(target.target.alpha, Tensor)
    return replace(target, target=replace(target.target, alpha=target.target.alpha * factor))


# Each is wrong by 1 % or one thing left out; the last one differs from the truth only where rows are soft.
MUTANTS: dict[str, LossFunction] = {
    "loss 1 % off": lambda x, y, scale, target: exact(x, y, scale, target) * 1.01,
    "images' gradient 1 % off": lambda x, y, scale, target: exact(_Scaled.apply(x, 1.01), y, scale, target),
    "texts' gradient 1 % off": lambda x, y, scale, target: exact(x, _Scaled.apply(y, 0.99), scale, target),
    "scale's gradient dropped": lambda x, y, scale, target: exact(x, y, scale.detach() + 0 * scale, target),
    "teacher 1 % off": lambda x, y, scale, target: exact(x, y, scale, _softer(target, 0.99)),
}


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Problem:
    """What is trained on what; `held_out`: the splits by which retrieval is judged."""

    config: Config
    training: TrainingData
    files: Mapping[str, bytes]
    held_out: dict[str, EvaluationSet]


@dataclass
class Run:
    """What training left: of every step the loss, the gradient's norm and the scale; the parameters; R@1 by split."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    parameters: Tensor = field(default_factory=lambda: torch.empty(0))  # all of them in a row
    recalls: dict[str, float] = field(default_factory=dict)


def problem(folder: Path, target: str, steps: int) -> Problem:
    """α rises from the first fifth of the steps on, to a half. In 500 steps retrieval gets from a guess to 65 %."""
    batch = 96
    sections = tiny(make_data(folder, concepts=2 * batch))
    sections["optimizer"] = {"steps": steps, "batch_size": batch, "warmup_steps": steps // 10, "lr": 3e-3}
    sections["loss"] = {"target": target, "hard_steps": steps // 5, "rise_steps": steps // 2, "alpha_end": 0.5}
    return problem_of(Config.from_dict(sections))


def problem_of(config: Config) -> Problem:
    training, held_out = open_training_data(config), read_evaluation(config.data).sets
    files = towers.build(config.model, training.captions).files
    return Problem(config, training, files, {name: held_out[name] for name in ("heldout", "vendor")})


Watch = Callable[[Tensor, Tensor, Tensor, Target], None]


def train(problem: Problem, loss_of: LossFunction, seed: int = 0, watch: Watch = lambda *operands: None) -> Run:
    """The trainer's model, batches, target, optimizer and schedules, in this process; the loss is `loss_of`. `seed` is
    that of the initial weights. `watch` is told the loss's operands at every step."""
    config, run = problem.config, Run()
    torch.manual_seed(seed)
    bundle, options = towers.build(config.model, tuple, files=problem.files), config.optimizer
    model = bundle.module
    groups = bundle.parameter_groups(options.weight_decay, None)
    optimizer = torch.optim.AdamW(groups, betas=(options.betas[0], options.betas[1]))
    for step, batch in enumerate(problem.training.batches(bundle, ALONE, 0, options.steps)):
        for settings in optimizer.param_groups:
            settings["lr"] = options.lr_at(step)
        x, y, scale = model(batch.images, batch.tokens)
        target = target_at(step, options.batch_size, config.loss, config.job.seed)
        watch(x.detach(), y.detach(), scale.detach(), target)
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
        result = evaluate_set(bundle, pairs, config.data, ALONE)
        run.recalls |= {
            f"{name} {i}": way.recall[1] for i, way in enumerate((result.image_to_text, result.text_to_image))
        }
    return run


# ----------------------------------------------------------------------------------------------------- along one run


class Beside:
    """Watches a run, and computes loss and gradients of every step in each of `ways` besides: how far each is from the
    exact ones at worst, in relation to the largest exact entry. The scale has one, which crosses 0: in relation to that
    of the whole run."""

    def __init__(self, ways: dict[str, LossFunction]) -> None:
        self._ways = ways
        self._errors: dict[str, dict[str, float]] = {name: {} for name in ways}
        self._steepest = 0.0

    def __call__(self, x: Tensor, y: Tensor, scale: Tensor, target: Target) -> None:
        true = self._result(exact, x, y, scale, target)
        self._steepest = max(self._steepest, true.dscale.abs().item())
        for name, way in self._ways.items():
            found, errors = self._result(way, x, y, scale, target), self._errors[name]
            for part in FIELDS:
                right = getattr(true, part).double()
                error = (getattr(found, part).double() - right).abs().max().item()
                unit = 1.0 if part == "dscale" else right.abs().max().item()
                errors[part] = max(errors.get(part, 0.0), error / unit)

    def worst(self) -> dict[str, dict[str, float]]:
        return {name: {**one, "dscale": one["dscale"] / self._steepest} for name, one in self._errors.items()}

    @staticmethod
    def _result(way: LossFunction, x: Tensor, y: Tensor, scale: Tensor, target: Target) -> Result:
        return Result.of(lambda *leaves: way(leaves[0], leaves[1], leaves[2], target), x, y, scale)


# ------------------------------------------------------------------------------------------------------------- two runs


FIRST = 20  # steps in which rounding has not grown yet
WINDOW = 25  # steps over which losses are averaged later


def apart(run: Run, reference: Run) -> dict[str, float]:
    """How far two runs are from each other: relative differences but for R@1, whose is absolute."""
    windows = range(0, len(run.losses), WINDOW)
    smooth = [[mean(one.losses[begin : begin + WINDOW]) for begin in windows] for one in (run, reference)]
    return {
        "first losses": _relative(run.losses[:FIRST], reference.losses[:FIRST]),
        "first gradient norms": _relative(run.grad_norms[:FIRST], reference.grad_norms[:FIRST]),
        "losses": _relative(*smooth),
        "scale": _relative(run.scales, reference.scales),
        "parameters": ((run.parameters - reference.parameters).norm() / reference.parameters.norm()).item(),
        "R@1": max(abs(run.recalls[name] - value) for name, value in reference.recalls.items()),
    }


def _relative(values: list[float], reference: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(values, reference, strict=True))
