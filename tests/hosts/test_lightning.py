"""Lightning's own trainer with the loss over all of its ranks, in one pass and in two: all parameters of 20 steps, the
first step's gradient in float64, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hosts import two_processes
from helpers.hosts.recording import Recording, against, furthest
from helpers.hosts.saved import growth

from softclip_kernels.testing import dense_loss

pytest.importorskip("lightning")

import lightning.pytorch as pl
from helpers.hosts import lightning_towers as towers

from softclip_kernels.integrations import lightning as adapter
from softclip_kernels.integrations.hooks import UnknownHost


@pytest.fixture(scope="module")
def one() -> list[dict[str, Any]]:
    return [towers.runs()]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    return two_processes.run("lightning_towers", tmp_path_factory.mktemp("lightning"))


@pytest.fixture(params=("one", "two"))
def ranks(request) -> list[dict[str, Any]]:
    """What each rank of a job of one or two processes did."""
    return request.getfixturevalue(request.param)


def recorded(rank: dict[str, Any], name: str) -> Recording:
    return Recording(**rank[name]["recording"])


OVER_RANKS = ("two passes, unused", "two passes, views", "two passes, static", "ours, fsdp2", "two passes, fsdp2")


@pytest.mark.parametrize("name", ("ours", "ours, accumulated", "two passes", *OVER_RANKS))
def test_twenty_steps_end_where_the_dense_loss_ends(request, name):
    """That of everybody's embeddings, gathered with their gradients. SGD with momentum, every parameter; what is logged
    is the loss of the whole batch."""
    for which in ("two",) if name in OVER_RANKS else ("one", "two"):
        ranks = request.getfixturevalue(which)
        host = recorded(ranks[0], "host, accumulated" if "accumulated" in name else "host")
        for rank in ranks:
            ours = recorded(rank, name)
            assert ours.steps == rank[name]["steps"] == 20
            assert furthest(ours, host) < 1e-6
            assert ours.losses == pytest.approx(host.losses, abs=2e-6)


def exact_gradients(ranks: list[dict[str, Any]], name: str, target: Any = None) -> dict[str, torch.Tensor]:
    """Of the batches that the first step met, each of all ranks, in float64 and one process."""
    met = [rank[name]["met"] for rank in ranks]
    model = towers.Towers(met[0][0][1].shape[1]).double()
    for parts in zip(*met, strict=True):
        batch = [torch.cat(pieces).double() for pieces in zip(*parts, strict=True)]
        x, y, scale = model(*batch)
        (dense_loss(x, y, scale.squeeze(), target and target(0, len(x))) / len(met[0])).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ("ours", "ours, accumulated", "two passes", "ours, psd", "two passes, psd"))
def test_the_first_gradient_is_that_of_the_global_batch_in_float64(ranks, name):
    exact = exact_gradients(ranks, name, towers.PSD.at if "psd" in name else None)
    for rank in ranks:
        compared = against(recorded(rank, name).gradients, exact)
        assert all(abs(ratio - 1) < 2e-6 and error < 5e-6 for ratio, error in compared.values()), compared


def test_progressive_self_distillation_draws_by_true_steps(ranks):
    """Four micro-batches of a step share a target, which is of the global batch."""
    for rank in ranks:
        global_batch = towers.BATCH * len(ranks)
        assert rank["ours, psd"]["asked"] == [(step, global_batch) for step in range(6) for _ in range(4)]
        assert rank["two passes, psd"]["asked"] == [(step, global_batch) for step in range(6)]


def test_two_passes_in_float16_go_through_the_trainers_scaler(ranks):
    """Its precision scales the loss, and its hooks are called before and after the backward pass."""
    for rank in ranks:
        name = "two passes, float16"
        assert rank[name]["backward hooks"] == rank["host"]["backward hooks"] == 2 * 20
        assert furthest(recorded(rank, name), recorded(rank, "ours, float16")) < 0.02
        exact = exact_gradients(ranks, name)
        compared = against(recorded(rank, name).gradients, exact)
        assert all(abs(ratio - 1) < 3e-2 and error < 5e-2 for ratio, error in compared.values()), compared


def test_adamw_trains_alike(ranks):
    for rank in ranks:
        assert recorded(rank, "ours, AdamW").losses == pytest.approx(recorded(rank, "host, AdamW").losses, abs=2e-6)


class Quiet(adapter.SoftClipMixin, pl.LightningModule):
    """Of nothing but its loss."""


def test_what_is_saved_grows_linearly():
    def one(n: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(n)
        x, y = (torch.randn(n, 16, generator=generator, requires_grad=True) for _ in range(2))
        return Quiet().softclip_loss(*(torch.nn.functional.normalize(each, dim=1) for each in (x, y)), 10.0, log=None)

    assert growth((128, 256, 512), one) < 1.05


def test_two_passes_need_manual_optimization():
    with pytest.raises(RuntimeError, match=r"set self\.automatic_optimization = False"):
        Quiet().two_pass([(torch.zeros(2, 3),)])


def test_another_host_is_an_error(monkeypatch):
    monkeypatch.setattr(pl.LightningModule, "log", lambda self, name, value: None)
    with pytest.raises(UnknownHost, match=r"LightningModule\.log takes"):
        Quiet()


def test_strategies_that_would_be_wrong_are_refused_by_name(two):
    for rank in two:
        assert "log_scale is in no module that fully_shard was applied to" in rank["refused"]["unsharded"]
        assert "tensor_parallel_size=2" in rank["refused"]["shared"]


@pytest.mark.parametrize("strategy", ("fsdp", "deepspeed_stage_2"))
def test_lightning_itself_refuses_these_strategies_on_a_cpu(strategy):
    """So they are not tested here; docs/integrations.md says so."""
    with pytest.raises(Exception, match="GPU"):
        towers.train(towers.Ours, strategy, steps=1)
