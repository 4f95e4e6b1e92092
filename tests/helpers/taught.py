"""Runs with teachers, of the tiny towers of helpers.engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from train import checkpoint, engine_files
from train.config import Config
from train.fingerprint import Fingerprint
from train.options import ModelOptions
from train.towers import build

from . import engines

RANKS = 2
HARD, RISE, END = 4, 8, 0.5  # of α
DECAY = 0.7


def config(kind: str, micro_batches: int = 1, **loss: Any) -> Config:
    options = {"hard_steps": HARD, "rise_steps": RISE, "alpha_end": END, "ema_decay": DECAY, **loss}
    sections = engines.config(kind, micro_batches=micro_batches).to_dict()
    return Config.from_dict({**sections, "loss": options})


def write_run(run: Path, towers: str = engines.NARROW_TOWERS, spoilt: str = "", **loss: Any) -> Path:
    """The checkpoint of a run of two ranks, with weights that no factory gives. `spoilt`: the file that has a NaN."""
    options = replace(config("1", **loss), model=ModelOptions(towers))
    with torch.random.fork_rng():
        torch.manual_seed(8)
        plain = build(options.model, tuple).module.state_dict()
        weights = {name: one + 0.1 * torch.randn_like(one) for name, one in plain.items()}
    ema = {name: one.clone() for name, one in weights.items()}
    for file, tensors in ((checkpoint.WEIGHTS, weights), (checkpoint.EMA_WEIGHTS, ema)):
        if file == spoilt:
            tensors["image.1.bias"][0] = torch.nan
    scratch, state = checkpoint.begin(run, 3), checkpoint.State(3, 0, RANKS, 1)
    (scratch / checkpoint.ENGINE).mkdir()
    for rank in range(RANKS):
        content = {"format": engine_files.FORMAT, "parts": [], "groups": [], "loss_scale": None}
        engine_files.write(scratch / checkpoint.ENGINE / engine_files.file_of(rank), content)
    with_ema = ema if "ema" in options.loss.teachers and spoilt != "none" else None
    checkpoint.write_portable(scratch, weights, options, {}, state, Fingerprint("data", "code"), with_ema)
    return checkpoint.commit(run, scratch, 3, keep=2, keep_every=0)
