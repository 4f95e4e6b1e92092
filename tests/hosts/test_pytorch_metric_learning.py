"""pytorch-metric-learning's losses between two tensors: equal to the host's, in value and gradient, trained for 20
steps; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hosts import two_processes
from helpers.hosts.recording import Recording, against, furthest
from helpers.hosts.saved import growth
from torch import Tensor

pytest.importorskip("pytorch_metric_learning")

from helpers.hosts import metric_towers
from helpers.hosts.metric_towers import HOST, OURS, TEMPERATURE, train
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

from softclip_kernels.integrations import pytorch_metric_learning as adapter
from softclip_kernels.integrations.hooks import UnknownHost


def embeddings(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    x, y = (torch.randn(n, 12, generator=generator, dtype=dtype) * 3 for n in (rows, columns))
    return x.requires_grad_(), y.requires_grad_()


def labels_of(kind: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """NTXent: every row's positive is a column of its own, and every fifth row has none. SupCon: classes of several."""
    generator = torch.Generator().manual_seed(1)
    if kind == "SupCon":
        return torch.randint(0, 5, (rows,), generator=generator), torch.randint(1, 7, (columns,), generator=generator)
    ref_labels = torch.randperm(columns, generator=generator)
    labels = ref_labels[torch.randint(0, columns, (rows,), generator=generator)].clone()
    labels[::5] = columns + 3
    return labels, ref_labels


@pytest.mark.parametrize("columns", (12, 30, 7))
@pytest.mark.parametrize("kind", HOST)
def test_values_and_gradients_are_the_hosts(kind, columns):
    """Squares and rectangles, such as a memory's embeddings of earlier batches; some rows have no positive."""
    x, y = embeddings(12, columns)
    labels, ref_labels = labels_of(kind, 12, columns)
    results = []
    for made in (HOST[kind](temperature=0.2), OURS[kind](temperature=0.2)):
        value = made(x, labels, ref_emb=y, ref_labels=ref_labels)
        results.append([value.detach(), *torch.autograd.grad(value, (x, y))])
    assert results[0][0] > 0
    for host, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, host, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    (
        {"reducer": reducers.ThresholdReducer(low=1.0)},
        {"reducer": reducers.MeanReducer()},
        {"reducer": reducers.ClassWeightedReducer(torch.arange(1.0, 60.0).double())},
        {"reducer": reducers.DoNothingReducer()},
        {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
    ),
    ids=("threshold", "mean", "class weights", "none", "regularizer"),
)
@pytest.mark.parametrize("kind", HOST)
def test_the_hosts_reducers_and_regularizers_go_on_working(kind, options):
    x, y = embeddings(12, 12)
    labels, ref_labels = labels_of(kind, 12, 12)
    host, ours = (losses_of[kind](**options)(x, labels, ref_emb=y, ref_labels=ref_labels) for losses_of in (HOST, OURS))
    if isinstance(host, dict):
        assert host["loss"]["reduction_type"] == ours["loss"]["reduction_type"]
        host, ours = host["loss"]["losses"], ours["loss"]["losses"]
    torch.testing.assert_close(ours, host, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", HOST)
def test_without_positives_or_negatives_both_are_zero(kind):
    x, y = embeddings(6, 6)
    labels = torch.arange(6)
    cases = [(labels, labels + 6)]
    if kind == "SupCon":
        cases.append((torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)))
    for rows, columns in cases:
        for made in (HOST[kind](), OURS[kind]()):
            value = made(x, rows, ref_emb=y, ref_labels=columns)
            assert value.item() == 0.0
            assert all(
                not each.any() for each in torch.autograd.grad(value, (x, y), allow_unused=True) if each is not None
            )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str, int], dict[str, Any]]]:
    """What each of two processes did."""
    return two_processes.run("metric_towers", tmp_path_factory.mktemp("metric"))


def assert_exact(ours: Recording, kind: str, accumulation: int) -> None:
    """The first step's gradient."""
    compared = against(ours.gradients, metric_towers.exact_gradients(kind, accumulation))
    assert all(abs(ratio - 1) < 2e-6 and error < 5e-6 for ratio, error in compared.values()), compared


@pytest.mark.parametrize("accumulation", (1, 4))
@pytest.mark.parametrize("kind", HOST)
def test_twenty_steps_end_where_the_hosts_loss_ends(kind, accumulation):
    """SGD with momentum, every parameter."""
    host, ours = (train(made[kind](temperature=TEMPERATURE), kind, accumulation) for made in (HOST, OURS))
    assert ours.steps == 20
    assert furthest(ours, host) < 1e-6
    assert_exact(ours, kind, accumulation)


@pytest.mark.parametrize("accumulation", (1, 4))
@pytest.mark.parametrize("kind", HOST)
def test_over_ranks_the_hosts_wrapper_takes_it(two, kind, accumulation):
    """DistributedLossWrapper gathers, as around the host's own loss; and one process with the whole batch trains
    alike."""
    whole = train(HOST[kind](temperature=TEMPERATURE), kind, accumulation)
    for rank in two:
        host, ours = (Recording(**rank[kind, whose, accumulation]) for whose in ("host", "ours"))
        assert ours.steps == 20
        assert furthest(ours, host) < 1e-6 and furthest(ours, whole) < 1e-6
        assert ours.losses == pytest.approx(whole.losses, abs=2e-6)
        assert_exact(ours, kind, accumulation)


@pytest.mark.parametrize("kind", HOST)
def test_adamw_trains_alike(kind):
    host, ours = (train(made[kind](temperature=TEMPERATURE), kind, adamw=True) for made in (HOST, OURS))
    assert ours.losses == pytest.approx(host.losses, abs=1e-5)


@pytest.mark.parametrize("kind", HOST)
def test_what_is_saved_grows_linearly(kind):
    def run(made: Any) -> float:
        def one(n: int) -> Tensor:
            classes = torch.arange(n) // (4 if kind == "SupCon" else 1)
            x, y = embeddings(n, n, torch.float32)
            return made(x, classes, ref_emb=y, ref_labels=classes.clone())

        return growth((16, 32, 64) if kind == "NTXent" else (128, 256, 512), one)

    assert run(OURS[kind]()) < 1.05
    assert run(HOST[kind]()) > 1.5  # NTXent's grows with the third power


@pytest.mark.parametrize("kind", HOST)
def test_what_it_does_not_cover_is_refused_by_name(kind):
    made, name = OURS[kind](), OURS[kind].__name__
    x, y = embeddings(6, 6)
    labels = torch.arange(6)
    with pytest.raises(ValueError, match=rf"{name}: ref_emb=None; .*SimCLR"):
        made(x, labels)
    for ref_labels in (labels, None):  # the host leaves the diagonal out, and says nothing
        assert HOST[kind]()(x, labels, ref_emb=y, ref_labels=ref_labels).item() == 0.0
        with pytest.raises(ValueError, match=rf"{name}: ref_labels is the same object as labels, or None"):
            made(x, labels, ref_emb=y, ref_labels=ref_labels)
    with pytest.raises(ValueError, match=rf"{name}: labels=None"):
        made(x, ref_emb=y)
    with pytest.raises(ValueError, match=rf"{name}: indices_tuple chooses pairs"):
        made(x, labels, miners.MultiSimilarityMiner()(x, labels, y, labels.clone()), y, labels.clone())
    for distance in (distances.LpDistance(), distances.DotProductSimilarity(), distances.CosineSimilarity(power=2)):
        with pytest.raises(ValueError, match=rf"{name}: distance={type(distance).__name__}.*allowed: CosineSimilarity"):
            OURS[kind](distance=distance)
    with pytest.raises(ValueError, match="backend"):
        OURS[kind](backend="fastest")
    with pytest.raises(Exception, match=f"CrossBatchMemory not supported for {name}"):  # the host's own words
        losses.CrossBatchMemory(made, 12)


def test_ntxent_of_several_positives_is_refused():
    """There it is not SupCon: each positive is contrasted with the negatives alone."""
    x, y = embeddings(6, 6)
    classes = torch.tensor([0, 0, 1, 2, 3, 4])
    host, supcon = (
        made(temperature=0.07)(x, classes, ref_emb=y, ref_labels=classes.clone())
        for made in (losses.NTXentLoss, losses.SupConLoss)
    )
    assert abs(host - supcon) > 0.1
    with pytest.raises(ValueError, match="2 of 6 rows have more than one positive in ref_labels"):
        adapter.SoftClipNTXentLoss()(x, classes, ref_emb=y, ref_labels=classes.clone())


@pytest.mark.parametrize("kind", HOST)
def test_another_host_is_an_error(monkeypatch, kind):
    monkeypatch.setattr(HOST[kind], "compute_loss", lambda self, embeddings, labels: None)
    with pytest.raises(UnknownHost, match="compute_loss"):
        OURS[kind]()
