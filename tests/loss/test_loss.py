"""The loss and its gradients against float64, for every target, backend, dtype and ragged size."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import FLOAT64_BACKENDS, dtypes_of

from softclip_kernels import (
    Average,
    Hard,
    Losses,
    Mix,
    SelfTeacher,
    SoftClipLoss,
    Teacher,
    softclip_loss,
    softclip_loss_with_ranks,
)
from softclip_kernels.testing import (
    ALL_TARGETS,
    FIELDS,
    RECTANGULAR_TARGETS,
    RELATIVE,
    SQUARE_TARGETS,
    Result,
    assert_as_accurate_as_dense,
    dense_row_losses,
    dense_target,
    matching_rows,
    operands,
    truth,
    unit_rows,
)

# The edge of a block in these tests is 48 (conftest): 47 to 49 straddle one block, 63 to 65 and 127 to 129 a register
# tile and a GPU tile, 1 and 2 are degenerate, 1000 has many blocks. D covers odd, tiny, and the usual tower widths.
SQUARE_SIZES = ((1, 3), (2, 1), (47, 64), (48, 1), (49, 320), (65, 96), (129, 768), (1000, 64))
RECTANGULAR_SIZES = ((1, 2, 3), (2, 1, 64), (64, 127, 96), (129, 63, 1), (65, 49, 2048), (1000, 65, 384))


def has_signal(n, m, d):
    """Whether a gradient is well above rounding. One row or column, and rows of one number that are all ±1, leave
    none to a target that is hard; a few leave little."""
    return min(n, m) > 2 and d > 1


def is_worthwhile(n, dtype, backend):
    """The hundreds of blocks of the largest size cost Python seconds: in one dtype only."""
    return n < 1000 or dtype == torch.float32 or backend != "chunked"


def check(target, n, m, d, dtype, backend):
    x, y, scale = operands(n, m, d, dtype=dtype)
    result, signal = Result.of_loss(x, y, scale, target, backend=backend), has_signal(n, m, d)
    if signal or backend != "cpu" or dtype == torch.float32:
        assert_as_accurate_as_dense(result, x, y, scale, target, signal=signal)
    else:
        assert_within_rounding_of_terms(result, x, y, scale, target)
    assert [getattr(result, field).dtype for field in FIELDS] == [scale.dtype, dtype, dtype, scale.dtype]


def assert_within_rounding_of_terms(result, x, y, scale, target):
    """Where a gradient's terms cancel, the rounding of a 16-bit G remains, which dense PyTorch may not have."""
    exact, matrices = truth(x, y, scale, target), dense_target(target, x.double(), y.double(), scale.double())
    largest = sum(max(1.0, one.max().item()) for one in (matrices.rows.sum(1), matrices.columns.sum(0)))
    rounding = RELATIVE[x.dtype] * scale.item() * largest / min(len(x), len(y))
    for field in FIELDS:
        assert (getattr(result, field).double() - getattr(exact, field)).abs().max() <= rounding, field


# Every scale, dtype and target on one size: test_mutants.py.
@pytest.mark.parametrize("name", SQUARE_TARGETS)
def test_square_targets(name, backend):
    for n, d in SQUARE_SIZES:
        for dtype in dtypes_of(backend):
            if is_worthwhile(n, dtype, backend):
                check(SQUARE_TARGETS[name](n, n), n, n, d, dtype, backend)


@pytest.mark.parametrize("name", RECTANGULAR_TARGETS)
def test_rectangular_targets(name, backend):
    for n, m, d in RECTANGULAR_SIZES:
        for dtype in dtypes_of(backend):
            if is_worthwhile(n, dtype, backend):
                check(RECTANGULAR_TARGETS[name](n, m), n, m, d, dtype, backend)


# The backends whose own gradient is not rounded within: the CPU and Triton kernels multiply a 16-bit G.
@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("name", ("groups_smoothing", "smoothing", "dense", "two_indices"))
def test_half_precision_gradients_are_rounded_once(name, backend):
    """Tiny batches, where a hard term's gradient and a softmax's nearly cancel."""
    sizes = ((2, 2, 8), (3, 3, 3)) if name in SQUARE_TARGETS else ((1, 2, 3), (2, 1, 3), (3, 2, 8))
    for n, m, d in sizes:
        target = ALL_TARGETS[name](n, m)
        for dtype in (torch.bfloat16, torch.float16):
            x, y, scale = operands(n, m, d, dtype=dtype)
            result = Result.of_loss(x, y, scale, target, backend=backend)
            assert_as_accurate_as_dense(result, x, y, scale, target, signal=False)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("name", ALL_TARGETS)
def test_float64_is_exact(name, backend):
    n = 65
    target = ALL_TARGETS[name](n, n)
    x, y, scale = unit_rows(n, 24), unit_rows(n, 24, seed=1), torch.tensor(14.3, dtype=torch.float64)
    result, exact = Result.of_loss(x, y, scale, target, backend=backend), truth(x, y, scale, target)
    for field in FIELDS:
        torch.testing.assert_close(getattr(result, field), getattr(exact, field), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_reductions_and_grad_output(backend):
    """Per-row gradients, an expanded (stride 0) one, zeros and a factor reach every operand."""
    n = 65
    target = SQUARE_TARGETS["psd"](n, n)
    x, y, scale = unit_rows(n, 16), unit_rows(n, 16, seed=1), torch.tensor(10.0, dtype=torch.float64)
    row_grad, column_grad = unit_rows(1, n, seed=3)[0], torch.ones((), dtype=torch.float64).expand(n)

    def with_gradients(losses):
        return (losses[0] * row_grad).sum() + (losses[1] * column_grad).sum()

    def by_rows(*leaves):
        losses = softclip_loss(*leaves, target, reduction="none", backend=backend)
        assert isinstance(losses, Losses)
        return with_gradients(losses)

    def dense(*leaves):
        return with_gradients(dense_row_losses(*leaves, dense_target(target, *leaves)))

    for field in FIELDS:
        torch.testing.assert_close(
            getattr(Result.of(by_rows, x, y, scale), field), getattr(Result.of(dense, x, y, scale), field)
        )
    mean = Result.of(lambda *leaves: softclip_loss(*leaves, target, backend=backend), x, y, scale)
    total = Result.of(lambda *leaves: softclip_loss(*leaves, target, reduction="sum", backend=backend), x, y, scale)
    torch.testing.assert_close(total.dx, n * mean.dx)
    zero = Result.of(lambda *leaves: 0.0 * softclip_loss(*leaves, target, backend=backend), x, y, scale)
    assert not zero.dx.any() and not zero.dy.any() and not zero.dscale.any()
    infinite = Result.of(lambda *leaves: torch.inf * softclip_loss(*leaves, target, backend=backend), x, y, scale)
    assert not infinite.dx.isfinite().any()


def test_strides(backend):
    """Transposed, sliced and expanded operands equal contiguous ones."""
    wide = unit_rows(100, 64, dtype=torch.float32)
    a, b = wide[:50, 1:64:3], wide.T.contiguous().T[50:, :63:3]
    scale = torch.tensor(14.3)
    views = (
        (wide[::2, ::2], wide[1::2, 1::2]),
        (wide.T.contiguous().T[:50], wide[50:]),
        (wide[:1].expand(50, 64), wide[50:]),
        (wide[:50, 3:40], wide.flip(0)[:50, 3:40]),
    )
    for x, y in views:
        strided = Result.of_loss(x, y, scale, Mix(Hard(), Teacher(a, b, 9.0), 0.5), backend=backend)
        plain = Mix(Hard(), Teacher(a.contiguous(), b.contiguous(), 9.0), 0.5)
        contiguous = Result.of_loss(x.contiguous(), y.contiguous(), scale, plain, backend=backend)
        for field in FIELDS:
            torch.testing.assert_close(getattr(strided, field), getattr(contiguous, field), rtol=2e-6, atol=1e-7)


def test_adversarial_values_stay_finite(backend):
    """Logits of ±1e4, identical rows, opposite rows, zero rows, converged pairs. Identical and converged ones have no
    gradient but rounding."""
    base = unit_rows(65, 32, dtype=torch.float32)
    zero_row = base.clone()
    zero_row[3] = 0
    cases = {
        "huge": (base * 1e2, base * -1e2, 1.0, True),
        "identical": (base[:1].expand(65, 32), base[:1].expand(65, 32), 100.0, False),
        "opposite": (base, -base, 100.0, True),
        "zero row": (zero_row, base, 100.0, True),
        "converged": (base, base, 100.0, False),
    }
    for target in (Hard(), Mix(Hard(), SelfTeacher(swap="paired"), 0.5)):
        for name, (x, y, scale, signal) in cases.items():
            scale = torch.tensor(scale)
            result = Result.of_loss(x, y, scale, target, backend=backend)
            assert result.loss.isfinite() and result.dx.isfinite().all() and result.dy.isfinite().all(), name
            assert_as_accurate_as_dense(result, x, y, scale, target, signal=signal)


def test_nan_in_nan_out(backend):
    """NaN or infinity in an embedding, or in a teacher's."""
    x, y = (unit_rows(65, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
    scale = torch.tensor(5.0)
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[5, 2] = value
        assert not Result.of_loss(bad, y, scale, None, backend=backend).loss.isfinite()
        for target in (Teacher(bad, y, 5.0), Mix(Hard(), Teacher(bad, y, 5.0), 0.5)):
            assert not Result.of_loss(x, y, scale, target, backend=backend).loss.isfinite()
    _, ranks = softclip_loss_with_ranks(x * torch.nan, y, scale, backend=backend)
    assert ranks.recall(10) == (0.0, 0.0), "NaN is no good match"


# Segments, several teachers and an index that is not the diagonal, beside the plain loss.
@pytest.mark.parametrize("name", ("hard", "psd_block", "psd_several", "two_indices"))
def test_memory_around_the_operands_is_left_alone(name, backend, monkeypatch):
    """Reads: rows and columns beyond the operands are NaN. Writes: allocations are fenced, and NaN where not zeroed."""
    n, d, fence, canary = 65, 24, 64, -12345.0
    scale, target = torch.tensor(14.3), ALL_TARGETS[name](65, 65)
    x, y = (unit_rows(n, d, seed=seed, dtype=torch.float32) for seed in (0, 1))
    expected = Result.of_loss(x, y, scale, target, backend=backend)
    inside = []
    for operand in (x, y):
        wide = torch.full((n + 2, d + 2 * fence), torch.nan)
        wide[1:-1, fence:-fence] = operand
        inside.append(wide[1:-1, fence:-fence])
    fences = []

    def fenced(value):
        def allocate(*shape, dtype=torch.float32, device=None):
            shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
            whole = torch.full((shape.numel() + 2 * fence,), canary if dtype.is_floating_point else -123).to(dtype)
            fences.extend((whole[:fence], whole[-fence:]))
            return whole[fence : fence + shape.numel()].fill_(value if dtype.is_floating_point else 0).view(shape)

        return allocate

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", fenced(torch.nan))
        patched.setattr(torch, "zeros", fenced(0.0))
        result = Result.of_loss(*inside, scale, target, backend=backend)
    assert all((one == one[0]).all() and one[0] in (canary, -123) for one in fences)
    assert fences or backend != "cpu"
    for field in FIELDS:
        torch.testing.assert_close(getattr(result, field), getattr(expected, field), rtol=2e-6, atol=1e-7)


def test_retrieval_ranks(backend):
    n = 129
    x = unit_rows(n, 16, dtype=torch.float32)
    y = matching_rows(x, noise=1.5)
    loss, ranks = softclip_loss_with_ranks(x, y, torch.tensor(20.0), backend=backend)
    z = x.double() @ y.double().T
    assert torch.equal(ranks.rows, (z > z.diagonal()[:, None]).sum(1))
    assert torch.equal(ranks.columns, (z > z.diagonal()[None, :]).sum(0))
    assert 0 < ranks.recall(1)[0] < ranks.recall(5)[0] < 1
    assert torch.equal(loss, softclip_loss(x, y, torch.tensor(20.0), backend=backend))


def test_ranks_with_labels_and_ties(backend):
    """Columns without a positive say -1; a duplicate of the positive ties in its favour."""
    x = unit_rows(4, 8, dtype=torch.float32)
    y = torch.cat([x, x[:1], unit_rows(1, 8, seed=5, dtype=torch.float32)])
    _, ranks = softclip_loss_with_ranks(x, y, torch.tensor(30.0), Hard(torch.tensor([4, 1, 2, 3])), backend=backend)
    assert ranks.rows.tolist() == [0, 0, 0, 0]
    assert ranks.columns.tolist()[0] == -1 and ranks.columns.tolist()[5] == -1
    assert ranks.columns.tolist()[1:5] == [0, 0, 0, 0]


def test_ranks_need_one_positive():
    x, labels = unit_rows(4, 8), torch.zeros(4, dtype=torch.int64)
    for target in (SelfTeacher(), Average([Hard(labels), Hard(labels + 1)])):
        with pytest.raises(ValueError, match="one positive a row"):
            softclip_loss_with_ranks(x, x, torch.tensor(1.0), target)


def test_module_is_a_drop_in():
    """The README's example, with open_clip's signature."""
    image_features, text_features = unit_rows(8, 4, dtype=torch.float32), unit_rows(8, 4, seed=1, dtype=torch.float32)
    log_scale = torch.tensor(2.6, requires_grad=True)
    loss = SoftClipLoss()(image_features, text_features, log_scale.exp())
    loss.backward()
    z = (log_scale.exp() * image_features @ text_features.T).detach()
    g = (z.softmax(1) + z.softmax(0) - 2 * torch.eye(8)) / 16
    torch.testing.assert_close(log_scale.grad, (g * z).sum())
    output = SoftClipLoss()(image_features, text_features, log_scale.exp(), output_dict=True)
    assert list(output) == ["contrastive_loss"] and torch.equal(output["contrastive_loss"], loss)
    assert not list(SoftClipLoss().parameters()) and not SoftClipLoss().state_dict()
