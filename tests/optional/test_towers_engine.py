"""Towers of the libraries in a DeepSpeed engine of two processes, in every stage: they learn what a plain PyTorch loop
with the dense loss teaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import engines
from helpers.engines import KINDS, PAIRS
from helpers.libraries import LENGTH, SIZE, WORDS, hugging_face_kind, timm_kind, write_open_clip
from helpers.ranks import Pool
from torch import Tensor

from softclip_kernels.testing import dense_loss
from train.config import Config
from train.options import ModelOptions
from train.towers import MAX_LOG_SCALE, build

RANKS = 2
STEPS = 20
TOLERANCE = 1e-5
QUICK = ("0", "1 offload", "2", "3", "3 offload both")
EVERY_KIND = pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
FLAT_AND_CUT = pytest.mark.parametrize("kind", ("1", "3"))  # parameters
# Not importorskip: the ranks import this file too, for its functions.
OPEN_CLIP, TIMM, HF = (
    pytest.mark.skipif(any(find_spec(name) is None for name in names), reason=f"needs {' and '.join(names)}")
    for names in (("open_clip", "transformers"), ("timm", "transformers"), ("transformers",))
)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Of all ranks: pictures, and tokens that any of the text towers takes, with an end where theirs is."""
    draw = np.random.default_rng(step)
    images = draw.normal(size=(PAIRS, 3, SIZE, SIZE)).astype(np.float32)
    tokens = draw.integers(4, len(WORDS), (PAIRS, LENGTH))
    tokens[:, 0], tokens[:, -1] = 1, 3
    return torch.from_numpy(images), torch.from_numpy(tokens)


def _train(group: Any, options: Config) -> tuple[list[float], dict[str, Tensor]]:
    """The losses, and the parameters that rank 0 gathers afterwards."""
    from train.step import train_step

    torch.manual_seed(0)
    engine = engines.start(group, options, build(options.model, list))
    losses = []
    for step in range(options.optimizer.steps):
        images, tokens = (whole.tensor_split(RANKS)[dist.get_rank()] for whole in batch(step))
        engine.train()
        losses.append(
            train_step(
                engine, engines.Share(images, tokens, {}, *2 * [torch.zeros(len(images))]), step, options, group
            ).loss
        )
    found = engines.weights(engine)
    engine.destroy()
    return losses, found


def options_of(model: ModelOptions, kind: str, target: str = "psd", micro_batches: int = 1, **optimizer: Any) -> Config:
    given = {"batch_size": PAIRS, "steps": STEPS, "warmup_steps": 2, "lr": 1e-3, "eps": 1e-4, "weight_decay": 0.2}
    options = engines.config(kind, micro_batches=micro_batches, **given | optimizer)
    return replace(options, model=model, loss=replace(options.loss, target=target))


def plain_loop(
    forward: Callable[..., Iterable[Tensor]], log_scale: Tensor, groups: list[dict[str, Any]], options: Config
) -> list[float]:
    from train.targets import target_at

    optimizer = torch.optim.AdamW(groups, betas=options.optimizer.betas, eps=options.optimizer.eps)
    losses = []
    for step in range(options.optimizer.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.optimizer.lr_at(step) * group.get("lr_scale", 1.0)
        loss = dense_loss(*forward(*batch(step)), target_at(step, PAIRS, options.loss, options.job.seed))
        optimizer.zero_grad()
        loss.backward()
        trained = [parameter for group in groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, options.optimizer.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            log_scale.clamp_(max=MAX_LOG_SCALE)
        losses.append(float(loss.detach()))
    return losses


def plain_losses(options: Config) -> list[float]:
    """Of our towers in one process, without DeepSpeed."""
    torch.manual_seed(0)
    bundle = build(options.model, list)
    groups = bundle.parameter_groups(options.optimizer.weight_decay, options.optimizer.layer_decay)
    return plain_loop(bundle.module, bundle.module.log_scale, groups, options)


@OPEN_CLIP
@pytest.mark.parametrize("micro_batches", (1, 3), ids=("one pass", "two passes"))
@pytest.mark.parametrize("target", ("hard", "psd"))
@EVERY_KIND
def test_open_clip_learns_what_a_plain_loop_teaches_it(
    pool: Pool, tmp_path: Path, kind: str, target: str, micro_batches: int
) -> None:
    import open_clip

    options = options_of(ModelOptions(write_open_clip(tmp_path)), kind, target, micro_batches)
    (found, weights), (others, _) = pool.run(_train, options)
    torch.manual_seed(0)
    model = open_clip.create_model(options.model.towers.removeprefix("open_clip:"))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    expected = plain_loop(model, model.logit_scale, groups, options)
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert found == others
    taught = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters() if name != "logit_scale"}
    assert max(float((weights[name] - one).norm() / one.norm()) for name, one in taught.items()) < 2 * TOLERANCE


@OPEN_CLIP
@pytest.mark.parametrize("micro_batches", (1, 3), ids=("one pass", "two passes"))
@FLAT_AND_CUT
def test_a_locked_image_tower_stays_and_the_texts_learn(
    pool: Pool, tmp_path: Path, kind: str, micro_batches: int
) -> None:
    options = options_of(ModelOptions(write_open_clip(tmp_path), lock="image"), kind, micro_batches=micro_batches)
    found, weights = pool.run(_train, options)[0]
    assert found == pytest.approx(plain_losses(options), rel=TOLERANCE)
    torch.manual_seed(0)
    for name, tensor in build(options.model, list).module.state_dict().items():
        assert torch.equal(weights[name], tensor) == ("visual" in name), name


@OPEN_CLIP
@FLAT_AND_CUT
def test_gradient_checkpointing_changes_no_loss(pool: Pool, tmp_path: Path, kind: str) -> None:
    model = ModelOptions(write_open_clip(tmp_path), gradient_checkpointing=True)
    options = options_of(model, kind, micro_batches=2, steps=5)
    assert pool.run(_train, options)[0][0] == pytest.approx(plain_losses(options), rel=TOLERANCE)


@TIMM
@FLAT_AND_CUT
def test_layers_of_timm_learn_at_rates_of_their_own(pool: Pool, tmp_path: Path, kind: str) -> None:
    model = timm_kind(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).options
    options = options_of(model, kind, steps=5, layer_decay=0.5)
    found = pool.run(_train, options)[0][0]
    assert found == pytest.approx(plain_losses(options), rel=TOLERANCE)
    alike = options_of(model, kind, steps=5)
    assert found != pytest.approx(plain_losses(alike), rel=TOLERANCE), "the rates make no difference"


@HF
@pytest.mark.parametrize("towers", ("clip", "siglip"))
@FLAT_AND_CUT
def test_towers_of_transformers_learn_too(pool: Pool, tmp_path: Path, kind: str, towers: str) -> None:
    options = options_of(hugging_face_kind(tmp_path, towers).options, kind, micro_batches=2, steps=5)
    assert pool.run(_train, options)[0][0] == pytest.approx(plain_losses(options), rel=TOLERANCE)
