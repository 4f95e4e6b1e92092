"""A whole job with a library's pretrained towers, on image-text shards, as a user starts it: what it begins with, and
what a checkpoint needs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from helpers import engines, jobs
from helpers.layouts import Pair, make_pairs, write_shards
from helpers.libraries import LENGTH, SIZE, WORDS, write_hugging_face, write_open_clip
from helpers.ranks import Pool
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from train import checkpoint
from train.config import Config
from train.evaluate import report
from train.evaluate.__main__ import main
from train.options import ModelOptions

RANKS = 2
STEPS = 20
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def needed() -> None:
    """Not at the top, for the ranks import this file, too."""
    for name in ("open_clip", "transformers"):
        pytest.importorskip(name)


def write_pretrained(folder: Path, **vision: Any) -> str:
    """model.towers for a folder of an open_clip model with weights."""
    import open_clip

    towers = write_open_clip(folder, **vision)
    torch.manual_seed(7)
    model = open_clip.create_model(towers.removeprefix("open_clip:"))
    save_file(model.state_dict(), folder / OPEN_CLIP_WEIGHTS)
    return towers


def pairs(first: int, count: int) -> list[Pair]:
    """Captions of two words that the towers know."""
    words = WORDS[4:]
    made = make_pairs(first + count)[first:]
    return [pair._replace(caption=f"{words[k % 7]} {words[k // 7 % 7]}") for k, pair in enumerate(made, first)]


def configuration(folder: Path, towers: str) -> Path:
    """Of a job in two passes, at a stage that cuts gradients, whose towers leave out patches at random."""
    sections = {
        "data": {
            "source": str(write_shards(folder / "pairs", pairs(0, 40), 16)),
            "evaluate": {"heldout": str(write_shards(folder / "heldout", pairs(40, 9), 9))},
        },
        "model": {"towers": towers},
        "loss": {"hard_steps": 2, "rise_steps": 8, "alpha_end": 0.5},
        "optimizer": {"steps": STEPS, "batch_size": 16, "warmup_steps": 2, "micro_batches": 2},
        "job": {"device": "cpu", "zero_stage": 2, "checkpoint_every": 4, "evaluate_every": 10, "precision": "fp32"},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return file


def run_job(*arguments: str) -> tuple[int, str]:
    return jobs.finish(jobs.start(*arguments, fault="none_with_libraries"))


@pytest.mark.usefixtures("needed")
def test_a_killed_job_goes_on_bitwise_without_the_pretrained_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pretrained"
    file = configuration(tmp_path, write_pretrained(folder, patch_dropout=0.5))
    whole, run = tmp_path / "whole", tmp_path / "run"
    status, said = run_job("--config", str(file), "--folder", str(whole))
    assert status == 0, said
    assert "| heldout | 9 | 9 |" in said
    assert "random weights" not in said

    job = jobs.start("--config", str(file), "--folder", str(run), fault="none_with_libraries")
    os.kill(jobs.wait_for(run, 1, lambda place: place.step >= 6).pid, signal.SIGKILL)
    status, said = jobs.finish(job)
    assert status != 0 and "rank 1 was the first to fail (killed by SIGKILL" in said, said
    shutil.rmtree(folder)
    begun = checkpoint.read_state(checkpoint.find(run)).step
    status, said = run_job("--resume", str(run))
    assert status == 0, said
    assert f"steps {begun} to {STEPS}" in said
    ours, theirs = (load_file(checkpoint.find(one) / checkpoint.WEIGHTS) for one in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert jobs.training_rows(run) == jobs.training_rows(whole)

    written = json.loads((run / report.FIGURES).read_text())
    (run / report.FIGURES).unlink()
    assert main([str(run)]) == 0
    assert "| heldout | 9 | 9 |" in capsys.readouterr().out
    assert json.loads((run / report.FIGURES).read_text()) == written


def batch() -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(0)
    tokens = draw.integers(4, len(WORDS), (5, LENGTH))
    tokens[:, 0], tokens[:, -1] = 1, 3
    return torch.from_numpy(draw.normal(size=(5, 3, SIZE, SIZE)).astype(np.float32)), torch.from_numpy(tokens)


def _rows(group: Any, options: Config) -> tuple[Tensor, Tensor]:
    """The embeddings that a new run begins with, on every rank."""
    from train.set_up import build_towers
    from train.world import World

    here = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), group)
    data: Any = SimpleNamespace(captions=list)
    engine = engines.start(group, options, build_towers(options, data, None, here))
    engine.eval()
    with torch.no_grad():
        x, y, _ = engine(*batch())
    engine.destroy()
    return x, y


def _library_rows(towers: str) -> tuple[Tensor, Tensor]:
    images, tokens = batch()
    with torch.no_grad():
        if towers.startswith("open_clip:"):
            import open_clip

            model = open_clip.create_model(towers.removeprefix("open_clip:")).eval()
            return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        from transformers import CLIPModel

        model = CLIPModel.from_pretrained(towers.removeprefix("hf:")).eval()
        x, y = model.get_image_features(images), model.get_text_features(tokens)
        return normalize(x.pooler_output, dim=-1), normalize(y.pooler_output, dim=-1)


@pytest.mark.usefixtures("needed")
@pytest.mark.parametrize("library", ("open_clip", "hf"))
@pytest.mark.parametrize("kind", ("0", "1", "2", "3", "3 offload both"))
def test_all_ranks_begin_with_the_pretrained_weights(pool: Pool, tmp_path: Path, kind: str, library: str) -> None:
    towers = write_pretrained(tmp_path) if library == "open_clip" else f"hf:{write_hugging_face(tmp_path, 'clip')}"
    options = replace(engines.config(kind), model=ModelOptions(towers))
    expected = _library_rows(towers)
    for found in pool.run(_rows, options):
        for rows, of_library in zip(found, expected, strict=True):
            torch.testing.assert_close(rows, of_library)
