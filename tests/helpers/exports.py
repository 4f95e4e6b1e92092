"""A run's checkpoint of any towers, without training."""

from __future__ import annotations

from pathlib import Path

import torch

from train import checkpoint, towers
from train.config import Config
from train.options import ModelOptions

from .data import CONCEPTS
from .saved_runs import FINGERPRINT

CAPTIONS = [f"thing {concept}" for concept in range(CONCEPTS)]


def write_run(run: Path, options: ModelOptions, step: int = 3) -> Path:
    """The run, with one more checkpoint: towers of `options` whose weights no file of theirs holds."""
    bundle = towers.build(options, lambda: CAPTIONS)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in bundle.module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    scratch = checkpoint.begin(run, step)
    state = checkpoint.State(step, 0, 1, 0)
    weights = bundle.module.state_dict()
    checkpoint.write_portable(scratch, weights, Config(model=options), bundle.files, state, FINGERPRINT)
    checkpoint.commit(run, scratch, step, keep=2, keep_every=0)
    return run
