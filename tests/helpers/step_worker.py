"""One rank of the tests that look inside a training step; test_job_failures.py starts two under torchrun.

It writes what it saw to <folder>/rank-<rank>.json.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)

from helpers.data import tiny
from train.config import Config
from train.data import Sampler, all_captions, load_pairs
from train.engine import gather_weights, load_engine, make_engine, nonfinite
from train.engine_files import tensors, why_unusable
from train.launch import leave
from train.model import Clip
from train.step import train_step
from train.tokenizer import train_tokenizer
from train.world import join_world


def snapshot(engine: Any) -> list[torch.Tensor]:
    return [safe_get_full_fp32_param(parameter).clone() for parameter in engine.module.parameters()]


def optimizer_state(engine: Any) -> list[torch.Tensor]:
    """This rank's part: master copies and moments."""
    return [one.clone() for one in tensors(engine.optimizer.state_dict())]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return sum(float((a - b).abs().sum()) for a, b in zip(one, other, strict=True))


def main(data: Path, folder: Path, stage: int) -> None:
    config = Config.from_dict(tiny(data, zero_stage=stage, precision="fp32"))
    seen: dict[str, Any] = {}
    with join_world(config.job) as world:
        pairs = load_pairs(data, "train")
        tokenizer = train_tokenizer(all_captions(pairs), 300)

        def new_engine() -> Any:
            torch.manual_seed(0)
            return make_engine(Clip(config.model, tokenizer.get_vocab_size()), config, world)

        engine = new_engine()
        sampler = Sampler(pairs, tokenizer, config.model.context_length, 16, 0)

        def step(number: int, spoil: bool = False, config: Config = config) -> Any:
            batch = sampler.share(number, world.rank, world.size, world.device)
            if spoil and world.rank == 1:
                batch.images[0, 0, 0, 0] = torch.nan
            return train_step(engine, batch, number, config, world.group)

        first = snapshot(engine)
        result = step(0)
        seen["good"] = result.applied and not same(first, snapshot(engine))

        # The same step in two passes over 3 micro-batches of unequal size, from the same initial weights: the same
        # gradient norm, and the same update but for entries whose gradient is rounding, of which Adam takes the sign.
        one_pass = snapshot(engine)
        engine.destroy()
        engine = new_engine()
        micro = replace(config, optimizer=replace(config.optimizer, micro_batches=3))
        again = step(0, config=micro)
        seen["norm of two passes"] = abs(again.grad_norm / result.grad_norm - 1) < 1e-4
        seen["update of two passes"] = distance(one_pass, snapshot(engine)) < 0.01 * distance(one_pass, first)

        before = snapshot(engine)
        seen["nan image on rank 1"] = not step(1, spoil=True).applied and same(before, snapshot(engine))

        # A finite loss whose gradient overflows on one rank only.
        weight = engine.module.image.project.weight
        if world.rank == 1:
            hook = weight.register_hook(lambda gradient: gradient * torch.inf)
        seen["gradient of rank 1"] = not step(2).applied and same(before, snapshot(engine))
        if world.rank == 1:
            hook.remove()
        seen["good afterwards"] = step(3).applied and not same(before, snapshot(engine))

        # 150 is beyond the bound: one step later the master copy and the parameter are at 100 or below.
        log_scale = engine.module.log_scale
        if stage == 3:
            safe_set_local_fp32_param(log_scale, torch.full_like(safe_get_local_fp32_param(log_scale), 150.0).log())
        else:
            safe_set_full_fp32_param(log_scale, torch.full((1,), 150.0).log())
        step(4)
        seen["master scale"] = float(safe_get_full_fp32_param(log_scale).exp())
        seen["scale seen by the next step"] = step(5).scale

        # What a checkpoint must not hold is found by all, whichever rank holds it. What it holds comes back.
        seen["all is finite"] = nonfinite(engine, gather_weights(engine, stage), world.group) == []
        saved = folder / "saved"
        engine.save_checkpoint(str(saved), tag="engine", save_latest=False)
        engine.checkpoint_engine.raise_failure()
        seen["readable without code"] = why_unusable(saved / "engine", world.size) is None
        parameters, state = snapshot(engine), optimizer_state(engine)
        engine.destroy()
        engine = new_engine()
        load_engine(engine, saved)
        seen["restored"] = same(parameters, snapshot(engine)) and same(state, optimizer_state(engine))
        if world.rank == 1:
            next(iter(engine.optimizer.optimizer.state.values()))["exp_avg"][0] = torch.nan
        seen["moments of rank 1"] = nonfinite(engine, gather_weights(engine, stage), world.group)
        engine.save_checkpoint(str(folder / "spoilt"), tag="engine", save_latest=False)
        seen["seen in the files"] = "NaN or infinity" in str(why_unusable(folder / "spoilt" / "engine", world.size))

        # A disk that is full for one rank's file ends neither rank while the other waits for it.
        if world.rank == 1:
            for path in (saved / "engine").glob("*_rank_1_*"):
                path.unlink()
                path.symlink_to("/dev/full")
        engine.save_checkpoint(str(saved), tag="engine", save_latest=False)
        try:
            engine.checkpoint_engine.raise_failure()
            seen["the disk is full for rank 1"] = world.rank == 0
        except OSError as error:
            seen["the disk is full for rank 1"] = world.rank == 1 and error.errno == errno.ENOSPC
        engine.destroy()
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    leave(0)
