"""The losses of one direction alone: what the definition says, whatever target, backend, dtype and reduction."""

from __future__ import annotations

import pickle
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.backends import FLOAT64_BACKENDS, dtypes_of
from helpers.ranks import shares
from helpers.sharding import PLANS, WIDTH, check

from softclip_kernels import (
    Exchange,
    Hard,
    SoftClipLoss,
    TwoPass,
    Weighted,
    WiringWarning,
    softclip_loss,
    softclip_loss_with_ranks,
)
from softclip_kernels.distributed import laps
from softclip_kernels.testing import (
    ALL_TARGETS,
    FIELDS,
    RECTANGULAR_TARGETS,
    SQUARE_TARGETS,
    Result,
    assert_as_accurate_as_dense,
    dense_row_losses,
    dense_target,
    operands,
    truth,
    unit_rows,
)

ONE_WAY = ("rows", "columns")
WEIGHTS = {"rows": (2.0, 0.0), "columns": (0.0, 2.0)}  # the same loss, as weights in both directions
RANKS = 3  # of the fixture `pool`

pytestmark = pytest.mark.filterwarnings("ignore::softclip_kernels.WiringWarning")


# The edge of a block in these tests is 48 (conftest): several blocks, ragged, more rows than columns and fewer.
@pytest.mark.parametrize("name", ALL_TARGETS)
def test_every_target_in_every_dtype(name, backend):
    sizes = ((65, 65),) if name in SQUARE_TARGETS else ((50, 97), (97, 50))
    for n, m in sizes:
        target = ALL_TARGETS[name](n, m)
        for dtype in dtypes_of(backend):
            x, y, scale = operands(n, m, 32, dtype=dtype)
            for direction in ONE_WAY:
                result = Result.of_loss(x, y, scale, target, backend=backend, direction=direction)
                assert_as_accurate_as_dense(result, x, y, scale, target, direction=direction)
                assert [getattr(result, field).dtype for field in FIELDS] == [scale.dtype, dtype, dtype, scale.dtype]


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("name", ALL_TARGETS)
def test_float64_is_exact(name, backend):
    target = ALL_TARGETS[name](65, 65)
    x, y, scale = unit_rows(65, 24), unit_rows(65, 24, seed=1), torch.tensor(14.3, dtype=torch.float64)
    for direction in ONE_WAY:
        result = Result.of_loss(x, y, scale, target, backend=backend, direction=direction)
        exact = truth(x, y, scale, target, direction=direction)
        for field in FIELDS:
            torch.testing.assert_close(getattr(result, field), getattr(exact, field), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("name", ALL_TARGETS)
def test_the_bits_are_those_of_weights(name, backend, reduction):
    """Twice one direction and nothing of the other, halved: powers of two, which round nothing."""
    x, y, scale = operands(65, 65, 24)
    target = ALL_TARGETS[name](65, 65)
    for direction in ONE_WAY:
        options = {"backend": backend, "reduction": reduction}
        named = Result.of_loss(x, y, scale, target, direction=direction, **options)
        weighted = Result.of_loss(x, y, scale, Weighted(target, WEIGHTS[direction]), **options)
        assert not named.differing(weighted)


def test_a_querys_loss_over_positives_and_hard_negatives():
    """As in retrieval: documents are [positives; negatives]. Nothing is warned of."""
    x, scale = unit_rows(20, 16).requires_grad_(), torch.tensor(20.0, dtype=torch.float64)
    documents = torch.cat([unit_rows(20, 16, seed=1), unit_rows(35, 16, seed=2)]).requires_grad_()
    labels = torch.arange(20)
    with warnings.catch_warnings(action="error", category=WiringWarning):
        loss = softclip_loss(x, documents, scale, Hard(labels), direction="rows", backend="reference")
    expected = F.cross_entropy(scale * x @ documents.T, labels)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(*(torch.autograd.grad(each, (x, documents)) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(one, other)
    smoothed = softclip_loss(x, documents, scale, Hard(labels, 0.1), direction="rows", backend="reference")
    torch.testing.assert_close(smoothed, F.cross_entropy(scale * x @ documents.T, labels, label_smoothing=0.1))


@pytest.mark.parametrize("name", ("psd", "labels", "groups_smoothing"))
def test_reductions_and_grad_output(name, backend):
    """ "none" leaves the other direction empty; every row's gradient is its own."""
    n, m = (65, 65) if name in SQUARE_TARGETS else (50, 97)
    target, options = ALL_TARGETS[name](n, m), {"backend": backend}
    x, y, scale = operands(n, m, 24)
    both = softclip_loss(x, y, scale, target, reduction="none", **options)
    for direction in ONE_WAY:
        place = ONE_WAY.index(direction)
        losses = softclip_loss(x, y, scale, target, reduction="none", direction=direction, **options)
        assert torch.equal(losses[place], both[place]) and losses[1 - place].shape == (0,)
        assert losses[1 - place].dtype == losses[place].dtype
        summed = softclip_loss(x, y, scale, target, reduction="sum", direction=direction, **options)
        torch.testing.assert_close(summed, both[place].sum())
        weights = torch.randn(len(both[place]), generator=torch.Generator().manual_seed(3))

        def fused(*leaves, direction=direction, place=place, weights=weights):
            losses = softclip_loss(*leaves, target, reduction="none", direction=direction, **options)
            return (weights * losses[place]).sum()

        def dense(*leaves, place=place, weights=weights):
            return (weights.double() * dense_row_losses(*leaves, dense_target(target, *leaves))[place]).sum()

        found, exact = Result.of(fused, x, y, scale), Result.of(dense, x.double(), y.double(), scale.double())
        for field in FIELDS:
            one, other = getattr(found, field).double(), getattr(exact, field)
            torch.testing.assert_close(one, other, rtol=0.0, atol=1e-4 * other.abs().max().item(), msg=field)


@pytest.mark.parametrize("direction", ONE_WAY)
def test_ranks_are_of_both_directions(direction, backend):
    x, y, scale = operands(50, 50, 24)
    _, expected = softclip_loss_with_ranks(x, y, scale, backend=backend)
    assert expected.rows.any() and expected.columns.any()
    loss, ranks = softclip_loss_with_ranks(x, y, scale, backend=backend, direction=direction)
    assert torch.equal(ranks.rows, expected.rows) and torch.equal(ranks.columns, expected.columns)
    torch.testing.assert_close(loss, softclip_loss(x, y, scale, backend=backend, direction=direction))


@pytest.mark.parametrize("direction", ONE_WAY)
@pytest.mark.parametrize("name", ("hard", "psd", "teacher", "groups_smoothing"))
def test_a_frozen_side_changes_no_other_gradient(name, direction, backend):
    target, scale = ALL_TARGETS[name](65, 65), torch.tensor(14.3)
    x, y, _ = operands(65, 65, 24)
    whole = Result.of_loss(x, y, scale, target, backend=backend, direction=direction)
    for learns, expected in (((True, False), whole.dx), ((False, True), whole.dy)):
        leaves = [leaf.clone().requires_grad_(each) for leaf, each in zip((x, y), learns, strict=True)]
        softclip_loss(*leaves, scale, target, backend=backend, direction=direction).backward()
        assert [leaf.grad is not None for leaf in leaves] == list(learns)
        assert torch.equal(leaves[learns.index(True)].grad, expected)


def test_the_module_takes_it():
    x, y, scale = operands(20, 20, 8)
    rows = softclip_loss(x, y, scale, direction="rows")
    assert not torch.equal(rows, softclip_loss(x, y, scale))
    loss = SoftClipLoss(direction="rows")
    assert torch.equal(loss(x, y, scale), rows) and "direction='rows'" in repr(loss)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(x, y, scale), rows)
    bias = torch.zeros(1, requires_grad=True)
    losses = SoftClipLoss(direction="rows", reduction="none")(x, y, scale, bias)
    assert losses.rows.shape == (20,) and losses.columns.shape == (0,)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, scale), rows)


@pytest.mark.parametrize("make", (lambda **given: softclip_loss(*operands(4, 4, 8), **given), SoftClipLoss))
@pytest.mark.parametrize("wrong", ("row", "x", None))
def test_another_word_is_refused(make, wrong):
    with pytest.raises(ValueError, match=f"direction={wrong!r}.*'both', 'rows', 'columns'"):
        make(direction=wrong)


def test_two_passes_follow_it():
    """The loss is any function of the whole batch's embeddings: the gradient is that of one pass."""

    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (torch.nn.Linear(6, 8, dtype=torch.float64) for _ in range(2))

        def forward(self, a, b):
            return F.normalize(self.left(a), dim=1), F.normalize(self.right(b), dim=1)

    torch.manual_seed(0)
    towers, a, b = Towers(), unit_rows(12, 6), unit_rows(12, 6, seed=1)
    softclip_loss(*towers(a, b), 10.0, direction="rows").backward()
    expected = [parameter.grad.clone() for parameter in towers.parameters()]
    towers.zero_grad()
    passes = TwoPass(towers, list(zip(a.split(5), b.split(5), strict=True)))
    passes.backward(softclip_loss(*passes.outputs, 10.0, direction="rows"))
    for parameter, gradient in zip(towers.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("direction", ONE_WAY)
@pytest.mark.parametrize("plan", PLANS)
def test_over_ranks(pool, plan, direction):
    """Uneven and empty shares, rows and columns shared out differently."""
    check(pool, tuple(SQUARE_TARGETS), (20, 25, 20), (20, 25, 20), plan, torch.float64, direction=direction)
    check(pool, tuple(RECTANGULAR_TARGETS), (7, 0, 30), (40, 21, 0), plan, torch.float64, direction=direction)
    names = ("hard", "psd", "labels", "teacher_sinkhorn")
    check(pool, names, (1, 44), (1, 44), plan, torch.float32, direction=direction)


def hard_negatives(group, plan):
    """Each rank's documents are its positives, then negatives of its own: dx and dy, and the sums over ranks of column
    values that were made."""
    rank = dist.get_rank(group)
    queries, negatives = shares((7, 12, 5))[rank], shares((10, 0, 9))[rank]
    x, positives, others = unit_rows(24, WIDTH), unit_rows(24, WIDTH, seed=1), unit_rows(19, WIDTH, seed=2)
    documents = torch.cat([positives[queries], others[negatives]])
    labels, scale = torch.arange(queries.stop - queries.start), torch.tensor(20.0, dtype=torch.float64)

    def loss(x, y, scale):
        return softclip_loss(x, y, scale, target, group=Exchange(group, plan), direction="rows")

    target = Hard(labels, local=True)
    with (
        mock.patch.object(laps, "sum_columns", wraps=laps.sum_columns) as sums,
        warnings.catch_warnings(action="error", category=WiringWarning),
    ):
        result = Result.of(loss, x[queries], documents, scale)
        target = Hard(labels + (0, 17, 29)[rank])  # the same as numbers of the global batch
        assert not result.differing(Result.of(loss, x[queries], documents, scale))

    # The global batch in one process.
    parts = zip(positives.split((7, 12, 5)), others.split((10, 0, 9)), strict=True)
    everything = torch.cat([part for pair in parts for part in pair])
    places = torch.cat([torch.arange(7), 17 + torch.arange(12), 29 + torch.arange(5)])
    exact = Result.of(lambda x, y, scale: F.cross_entropy(scale * x @ y.T, places), x, everything, scale)
    own = shares((17, 12, 14))[rank]
    torch.testing.assert_close(result.dx / 3, exact.dx[queries])
    torch.testing.assert_close(result.dy / 3, exact.dy[own])
    return result.loss.item() - exact.loss.item(), result.dscale.item() - exact.dscale.item(), sums.call_count


@pytest.mark.parametrize("plan", PLANS)
def test_documents_of_every_rank_are_negatives(pool, plan):
    """A rectangle over ranks, with labels that count a rank's own documents and with those of the global batch. No sum
    of column values is made: the columns have no loss that would need one."""
    found = pool.run(hard_negatives, plan)
    loss, dscale, _ = (sum(values) / 3 for values in zip(*found, strict=True))
    assert abs(loss) < 1e-12 and abs(dscale) < 1e-12
    assert [sums for *_, sums in found] == [0, 0, 0]


def reduced(group, plan):
    rank = dist.get_rank(group)
    own = shares((13, 20))[rank]
    x, y, scale = operands(33, 33, WIDTH, dtype=torch.float64)
    target, options = SQUARE_TARGETS["psd"](33, 33), {"group": Exchange(group, plan)}
    losses = dense_row_losses(x, y, scale, dense_target(target, x, y, scale))
    for place, direction in enumerate(ONE_WAY):
        each = softclip_loss(x[own], y[own], scale, target, reduction="none", direction=direction, **options)
        torch.testing.assert_close(each[place], losses[place][own])
        assert each[1 - place].shape == (0,)
        total = softclip_loss(x[own], y[own], scale, target, reduction="sum", direction=direction, **options)
        dist.all_reduce(total, group=group)
        torch.testing.assert_close(total / 2, losses[place].sum())
    try:
        softclip_loss(x[own], y[own], scale, target, direction=ONE_WAY[rank], **options)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("plan", PLANS)
def test_reductions_over_ranks_and_ranks_that_disagree(pool, plan):
    for message in pool.run(reduced, plan, ranks=2):
        assert "direction='rows'" in message and "direction='columns'" in message
