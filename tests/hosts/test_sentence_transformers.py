"""sentence-transformers' own trainer with the loss in the place of its own: all parameters of 20 steps, the first
step's gradient in float64, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hosts import two_processes
from helpers.hosts.recording import Recording, against, furthest
from helpers.hosts.saved import growth
from torch import nn

from softclip_kernels import EachStep, Hard, ProgressiveSelfDistillation, Weighted, schedules
from softclip_kernels.testing import dense_loss

pytest.importorskip("sentence_transformers")

from helpers.hosts import sentences
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import dot_score

from softclip_kernels.integrations import sentence_transformers as adapter
from softclip_kernels.integrations.hooks import UnknownHost

BOTH = sentences.BOTH
PROGRESSIVE = ProgressiveSelfDistillation(schedules.Constant(0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return sentences.write_model(tmp_path_factory.mktemp("sentences"))


@pytest.fixture(scope="module")
def one(folder) -> list[dict[str, Any]]:
    return [{"runs": sentences.runs(folder, gather=False)}]


@pytest.fixture(scope="module")
def two(folder) -> list[dict[str, Any]]:
    return two_processes.run("sentences", folder)


@pytest.fixture(params=("one", "two"))
def ranks(request) -> list[dict[str, Any]]:
    """What each rank of a job of one or two processes did."""
    return request.getfixturevalue(request.param)


def recorded(rank: dict[str, Any], *name: str) -> Recording:
    return Recording(**rank["runs"][name if len(name) > 1 else name[0]][0])


@pytest.mark.parametrize("case", sentences.CASES)
def test_twenty_steps_end_where_the_hosts_loss_ends(ranks, case):
    """Over ranks: the host's with gather_across_devices. SGD with momentum, every parameter."""
    host = recorded(ranks[0], case, "host")
    for rank in ranks:
        ours = recorded(rank, case, "ours")
        assert ours.steps == 20
        assert furthest(ours, host) < 1e-6
        assert ours.losses == pytest.approx(recorded(rank, case, "host").losses, abs=5e-6)


@pytest.mark.parametrize("case", sentences.CASES)
def test_the_first_gradient_is_that_of_the_global_batch_in_float64(folder, ranks, case):
    _, options, accumulation, _ = sentences.CASES[case]
    met = [
        sentences.joined([rank["runs"][case, "ours"][1][k] for rank in ranks]) for k in range(accumulation)
    ]  # fmt: skip
    exact = sentences.exact_gradients(folder, met, **options)
    for rank in ranks:
        compared = against(recorded(rank, case, "ours").gradients, exact)
        assert all(abs(ratio - 1) < 1e-5 and error < 5e-5 for ratio, error in compared.values()), compared


def test_progressive_self_distillation_draws_by_the_trainers_steps(folder, ranks):
    """Four micro-batches of a step share a target, which is of the global batch; evaluation is the host's."""
    for rank in ranks:
        (*_, asked, evaluated) = rank["runs"]["psd"]
        assert asked == [(step, 8 * len(ranks)) for step in range(sentences.PSD_STEPS) for _ in range(4)]
        assert recorded(rank, "psd").steps == sentences.PSD_STEPS
        assert furthest(recorded(rank, "psd"), recorded(ranks[0], "psd")) == 0.0
    model = sentences.make_model(folder)
    model.load_state_dict(recorded(ranks[0], "psd").parameters, strict=False)
    data = sentences.data(2, 160).select(range(24))
    features = [model.preprocess(list(data[column])) for column in ("anchor", "positive")]
    with torch.no_grad():
        host = MultipleNegativesRankingLoss(model, **BOTH)(features, None)
    assert evaluated == pytest.approx(host.item(), abs=1e-5)


def test_its_first_gradient_is_that_of_the_dense_loss_in_float64(folder, one):
    _, met, *_ = one[0]["runs"]["psd"]
    psd = ProgressiveSelfDistillation(schedules.Linear(0.5, 1.0, steps=sentences.PSD_STEPS))
    model = sentences.make_model(folder).double()
    for features in met:
        x, y = (nn.functional.normalize(model(dict(column))["sentence_embedding"], dim=1) for column in features)
        (dense_loss(x, y, torch.tensor(20.0, dtype=torch.float64), psd.at(0, 8)) / 4).backward()
    exact = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    compared = against(recorded(one[0], "psd").gradients, exact)
    assert all(abs(ratio - 1) < 1e-5 and error < 5e-5 for ratio, error in compared.values()), compared


def test_shares_of_different_sizes_are_one_batch(two):
    """The host's own gathering needs equal shares."""
    together = [torch.cat(parts).double().requires_grad_() for parts in zip(*map(sentences.share, (0, 1)), strict=True)]
    exact = MultipleNegativesRankingLoss(nn.Identity(), **BOTH).compute_loss_from_embeddings(together, None)
    exact.backward()
    found = [rank["uneven"] for rank in two]
    assert torch.stack([each["loss"] for each in found]).mean().item() == pytest.approx(exact.item(), rel=1e-6)
    for k, column in enumerate(together):
        mean = torch.cat([each["gradients"][k] for each in found]) / 2  # as DDP averages
        torch.testing.assert_close(mean.double(), column.grad, rtol=1e-4, atol=1e-7)


def test_adamw_trains_alike(folder):
    host, ours = (
        sentences.train(folder, losses[False], steps=10, adamw=True)[0] for losses in (sentences.HOST, sentences.OURS)
    )
    assert host.losses == pytest.approx(ours.losses, abs=2e-5)


def embeddings(n: int, columns: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(n, 16, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(columns)]


@pytest.mark.parametrize("options", ({}, BOTH, {"partition_mode": "per_direction"}), ids=("one", "both", "one apart"))
@pytest.mark.parametrize("columns", (2, 3, 6))
def test_every_column_layout_equals_the_host(columns, options):
    results = []
    for loss in (MultipleNegativesRankingLoss, adapter.SoftClipMultipleNegativesRankingLoss):
        given = embeddings(7, columns)
        value = loss(nn.Identity(), **options).compute_loss_from_embeddings(given, None)
        results.append([value.detach(), *torch.autograd.grad(value, given)])
    for host, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, host, rtol=1e-9, atol=1e-12)


def test_a_target_of_one_direction_is_its_rows():
    x, y = embeddings(8, 2)
    loss = adapter.SoftClipMultipleNegativesRankingLoss(nn.Identity(), target=PROGRESSIVE.at(3, 8))
    x_unit, y_unit = nn.functional.normalize(x, dim=1), nn.functional.normalize(y, dim=1)
    scale = torch.tensor(20.0, dtype=torch.float64)
    exact = dense_loss(x_unit, y_unit, scale, Weighted(PROGRESSIVE.at(3, 8), (2.0, 0.0)))
    assert loss.compute_loss_from_embeddings([x, y], None).item() == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.parametrize("cached", (False, True))
def test_the_hosts_matryoshka_loss_takes_it(folder, cached):
    results = []
    for losses in (sentences.HOST, sentences.OURS):
        model = sentences.make_model(folder)
        loss = MatryoshkaLoss(model, losses[cached](model), [32, 8])
        features = [model.preprocess(list(sentences.data(2, 16)[column])) for column in ("anchor", "positive")]
        loss(features, None).backward()
        results.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    compared = against(results[1], results[0])
    assert all(abs(ratio - 1) < 1e-4 and error < 1e-4 for ratio, error in compared.values()), compared


def test_what_is_saved_grows_linearly():
    def run(make: Any) -> float:
        return growth(
            (128, 256, 512), lambda n: make(nn.Identity()).compute_loss_from_embeddings(embeddings(n, 3), None)
        )

    assert run(adapter.SoftClipMultipleNegativesRankingLoss) < 1.05
    assert run(MultipleNegativesRankingLoss) > 1.5  # the host's matrices of scores


@pytest.mark.parametrize("cached", (False, True))
@pytest.mark.parametrize(
    ("options", "named"),
    (
        ({"hardness_mode": "hard_negatives", "hardness_strength": 5.0}, "hardness_mode='hard_negatives'"),
        ({"directions": ("query_to_doc", "query_to_query")}, "query_to_query"),
        ({"directions": ("query_to_doc", "doc_to_doc")}, "doc_to_doc"),
        ({"directions": ("query_to_doc", "doc_to_query")}, "partition_mode='joint'"),
        ({"similarity_fct": dot_score}, "similarity_fct=dot_score"),
    ),
)
def test_what_it_does_not_cover_is_refused_by_name(cached, options, named):
    host, ours = sentences.HOST[cached], sentences.OURS[cached]
    model = nn.Sequential(nn.Identity())
    with pytest.raises(
        ValueError, match=rf"{ours.__name__}: .*{named}.*; allowed: .*The host's {host.__name__} takes it"
    ):
        ours(model, **options)
    later = ours(model)
    for name, value in options.items():
        setattr(later, name, value)
    with pytest.raises(ValueError, match=named):
        later._loss(embeddings(4, 2))


def test_targets_and_backends_are_checked():
    loss = adapter.SoftClipMultipleNegativesRankingLoss
    with pytest.raises(TypeError, match="target"):
        loss(nn.Identity(), target=PROGRESSIVE)
    with pytest.raises(ValueError, match="backend"):
        loss(nn.Identity(), backend="fastest")
    with pytest.raises(ValueError, match="target= is for pairs, but the batch has 3 columns"):
        loss(nn.Identity(), target=Hard(smoothing=0.1)).compute_loss_from_embeddings(embeddings(4, 3), None)
    with pytest.raises(ValueError, match="at least an anchor and a positive"):
        loss(nn.Identity()).compute_loss_from_embeddings(embeddings(4, 1), None)
    assert "target" not in loss(nn.Identity()).get_config_dict()
    target = EachStep(PROGRESSIVE.at, lambda: 0)
    assert loss(nn.Identity(), target=target).get_config_dict()["target"] == repr(target)


@pytest.mark.parametrize("method", ("compute_loss_from_embeddings", "calculate_loss"))
def test_another_host_is_an_error(monkeypatch, method):
    """One that would never call what is overridden."""
    cached = method == "calculate_loss"
    original = CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss
    monkeypatch.setattr(original, method, lambda self, columns: None)
    with pytest.raises(UnknownHost, match=method):
        sentences.OURS[cached](nn.Sequential(nn.Identity()))
