"""transformers' Trainer with its DeepSpeed plug-in, in two processes: ZeRO 2 and 3 train as the host's own loss does in
one process. ZeRO has no gradients to look at before a step, so all parameters after 20 steps stand for them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

import torch
from helpers.hosts.recording import Recording, furthest
from helpers.hosts.trainer_runs import STEPS, run
from helpers.ranks import run_interpreters
from transformers import CLIPModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("deepspeed")
    start = "from helpers.hosts import on_cpu\non_cpu.prepare()\nfrom helpers.hosts.trainer_runs import rank_main"
    run_interpreters(f"{start}\nrank_main({str(folder)!r}, 'with_deepspeed')", 2, patience=500, DS_ACCELERATOR="cpu")
    return folder


@pytest.mark.parametrize("accumulation", (1, 4))
def test_zero_trains_as_the_hosts_loss_in_one_process(folder, accumulation):
    host = Recording(**run(False, accumulation)["recording"])
    for rank in range(2):
        found = torch.load(folder / f"rank{rank}.pt")
        for stage in (2, 3):
            ours = found[f"ZeRO-{stage}, {accumulation}"]
            assert ours["global_step"] == STEPS
            assert furthest(Recording(**ours["recording"]), host) < 1e-6


@pytest.mark.parametrize("stage", (2, 3))
def test_files_are_the_hosts(folder, stage):
    """Saved by the Trainer, read by the host's model, whose scale has no dimension."""
    model = CLIPModel.from_pretrained(folder / f"ZeRO-{stage}, 1")
    right = torch.load(folder / "rank0.pt")[f"ZeRO-{stage}, 1"]["recording"]["parameters"]
    assert model.logit_scale.shape == ()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, right[name]), name
