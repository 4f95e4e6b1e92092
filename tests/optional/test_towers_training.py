"""A library's towers trained through ours equal the same towers in a plain loop with a dense loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.libraries import LENGTH, SIZE, register_open_clip
from torch import Tensor

from softclip_kernels import Hard, ProgressiveSelfDistillation, Target, TwoPass, schedules, softclip_loss
from softclip_kernels.testing import dense_loss
from train.options import ModelOptions
from train.towers import build

open_clip = pytest.importorskip("open_clip")

STEPS, PAIRS = 20, 12


def target_at(step: int, soft: bool) -> Target:
    return ProgressiveSelfDistillation(schedules.Constant(0.4), seed=1).at(step, PAIRS) if soft else Hard()


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = np.random.default_rng(0)
    images = draw.normal(size=(STEPS, PAIRS, 3, SIZE, SIZE)).astype(np.float32)
    tokens = draw.integers(1, 1000, (STEPS, PAIRS, LENGTH))
    tokens[..., -1] = 49407  # the end token, which the text tower reads at
    return [(torch.from_numpy(image), torch.from_numpy(text)) for image, text in zip(images, tokens, strict=True)]


@pytest.mark.parametrize("parts", (1, 3))
@pytest.mark.parametrize("soft", (False, True), ids=("hard", "psd"))
def test_twenty_steps_of_open_clip_equal_those_of_a_plain_loop(tmp_path: Path, soft: bool, parts: int) -> None:
    name = register_open_clip(tmp_path, "ViT-trained")
    torch.manual_seed(0)
    plain = open_clip.create_model(name)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    expected = []
    for step, (images, tokens) in enumerate(batches()):
        x, y, scale = plain(images, tokens)
        loss = dense_loss(x, y, scale, target_at(step, soft))
        expected.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    torch.manual_seed(0)
    bundle = build(ModelOptions(f"open_clip:{name}"), list)
    optimizer = torch.optim.SGD(bundle.parameter_groups(0.0, None), 0.1)
    found = []
    for step, (images, tokens) in enumerate(batches()):
        passes = TwoPass(bundle.module, list(zip(images.tensor_split(parts), tokens.tensor_split(parts), strict=True)))
        loss = softclip_loss(*passes.outputs, target_at(step, soft))
        found.append(float(loss.detach()))
        optimizer.zero_grad()
        passes.backward(loss)
        optimizer.step()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    state = bundle.module.library_state(bundle.module.state_dict())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5, msg=key)
