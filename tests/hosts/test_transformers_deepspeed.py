"""DeepSpeed under transformers' Trainer, with the mixins: as one process that has the whole batch."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

import torch
import torch.distributed as dist
from helpers.hosts import on_cpu
from helpers.hosts.recording import Recording, against, furthest
from helpers.hosts.trainer_runs import (
    BATCH,
    CLIP,
    Ours,
    collate,
    exact_gradients,
    forget_ranks,
    model_of,
    pairs,
    run,
    settings,
)
from transformers import CLIPModel

from softclip_kernels.distributed.whole import full_parameters

RANKS = 2  # of the fixture `pool`
RATE = 0.05  # as in trainer_runs.run


def train(group, stage, accumulation, rate, folder, **options):
    """This rank's parameters after training, whole. The model is read from folder/host (ZeRO-3 cuts its parameters
    while it is made) and written to folder/ours."""
    on_cpu.spare_a_build()
    rank, world = str(dist.get_rank(group)), str(dist.get_world_size(group))
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    engine = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    forget_ranks()
    chosen = settings(
        folder,
        BATCH // accumulation // RANKS,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        deepspeed=engine,
        **options,
    )
    model = CLIP.from_pretrained(folder / "host")
    assert hasattr(model.logit_scale, "ds_id") == (stage == 3)
    sgd = (torch.optim.SGD, {"lr": rate, "momentum": 0.9})  # the host makes it: under DeepSpeed it drops a given one
    trainer = Ours(model=model, args=chosen, train_dataset=pairs(), data_collator=collate, optimizer_cls_and_kwargs=sgd)
    trainer.train()
    trainer.save_model(str(folder / "ours"))
    parameters = full_parameters(model)
    forget_ranks()
    return parameters


@pytest.fixture
def folder(tmp_path):
    model_of().save_pretrained(tmp_path / "host")
    return tmp_path


@pytest.mark.parametrize(("stage", "accumulation"), ((2, 1), (2, 4), (3, 1)))
def test_zero_trains_as_one_process_that_has_the_whole_batch(pool, folder, stage, accumulation):
    host = Recording(**run(False, accumulation)["recording"])
    for parameters in pool.run(train, stage, accumulation, RATE, folder):
        parameters["logit_scale"] = parameters["logit_scale"].reshape(())
        assert furthest(Recording(parameters=parameters), host) < 1e-6


@pytest.mark.parametrize("stage", (2, 3))
def test_the_first_gradient_is_exact_and_files_are_the_hosts(pool, folder, stage):
    """Read from a step of length 1, for ZeRO shows no gradient."""
    before, exact = dict(model_of().named_parameters()), exact_gradients()
    trained = pool.run(one_step, stage, folder)
    saved = dict(CLIPModel.from_pretrained(folder / "ours").named_parameters())
    assert saved["logit_scale"].shape == ()
    for after in (*trained, saved):
        steps = {name: (before[name] - each.reshape(before[name].shape)).detach() for name, each in after.items()}
        for name, (ratio, error) in against(steps, exact).items():
            assert abs(ratio - 1) < 2e-5 and error < 2e-5, (name, ratio, error)


def one_step(group, stage, folder):
    return train(group, stage, 1, 1.0, folder, max_steps=1)
