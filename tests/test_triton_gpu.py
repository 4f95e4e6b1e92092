"""The Triton kernels on a GPU: every target and dtype against float64, repeats, memory. Needs torch, triton and pytest
only; `python -m bench gpu` runs this file first."""

from __future__ import annotations

import dataclasses

import pytest
import test_loss
import torch
from conftest import ALL_TARGETS, RECTANGULAR_TARGETS, SQUARE_TARGETS

from softclip_kernels import Hard, softclip_loss, softclip_loss_with_ranks
from softclip_kernels.testing import Result, assert_as_accurate_as_dense, unit_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run on a machine with a GPU"),
]

FIELDS = ("loss", "dx", "dy", "dscale")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on_gpu(value):
    """A target with every tensor in it on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, (tuple, list)):
        return type(value)(on_gpu(one) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value) if field.init)
        return dataclasses.replace(value, **{name: on_gpu(getattr(value, name)) for name in fields})
    return value


def operands(n, m, d, dtype, scale=14.3):
    return tuple(one.cuda() for one in test_loss.operands(n, m, d, dtype, scale))


def fused(x, y, scale, target):
    return Result.of(lambda *leaves: softclip_loss(*leaves, target, backend="triton"), x, y, scale)


def check(name, n, m, d, dtype, scale=14.3):
    target = on_gpu(ALL_TARGETS[name](n, m))
    x, y, scale = operands(n, m, d, dtype, scale)
    assert_as_accurate_as_dense(fused(x, y, scale, target), x, y, scale, target)


# A tile is up to 128 x 256, a step along the width 64: sizes below, at and beyond them, ragged and whole, and enough of
# them for several super-blocks of 4096 in the backward pass.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SQUARE_TARGETS)
def test_square_targets(name, dtype):
    for n, d in ((1, 3), (129, 40), (512, 64), (1000, 96), (2048, 768)):
        check(name, n, n, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECTANGULAR_TARGETS)
def test_rectangular_targets(name, dtype):
    for n, m, d in ((1, 2, 3), (127, 300, 100), (512, 256, 64), (1000, 333, 832)):
        check(name, n, m, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (1.0, 100.0, 300.0))
@pytest.mark.parametrize("name", ("hard", "psd", "psd_own_scale", "psd_external", "psd_several", "psd_block"))
def test_scales_and_super_blocks(name, scale, dtype):
    check(name, 700, 700, 128, dtype, scale)
    if scale == 1.0 and name in ("hard", "psd"):
        check(name, 6000, 6000, 64, dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ("huge", "identical", "opposite", "zero row"))
def test_adversarial_values(case, dtype):
    base = unit_rows(300, 64, dtype=torch.float32)
    zero_row = base.clone()
    zero_row[3] = 0
    x, y, scale = {
        "huge": (base * 1e2, base * -1e2, 1.0),
        "identical": (base[:1].expand(300, 64), base[:1].expand(300, 64), 100.0),
        "opposite": (base, -base, 100.0),
        "zero row": (zero_row, base, 100.0),
    }[case]
    x, y, scale = x.cuda().to(dtype), y.cuda().to(dtype), torch.tensor(scale).cuda()
    for name in ("hard", "psd"):
        target = on_gpu(SQUARE_TARGETS[name](300, 300))
        result = fused(x, y, scale, target)
        assert all(getattr(result, field).isfinite().all() for field in FIELDS)
        assert_as_accurate_as_dense(result, x, y, scale, target)


@pytest.mark.parametrize("name", ("hard", "psd", "psd_several"))
def test_repeats_are_bitwise_equal(name):
    x, y, scale = operands(5000, 5000, 64, torch.bfloat16)
    target = on_gpu(SQUARE_TARGETS[name](5000, 5000))
    first = fused(x, y, scale, target)
    for _ in range(250):
        again = fused(x, y, scale, target)
        assert all(torch.equal(getattr(first, field), getattr(again, field)) for field in FIELDS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(dtype):
    x, y, scale = operands(700, 700, 64, dtype)
    _, ranks = softclip_loss_with_ranks(x, y, scale, backend="triton")
    _, expected = softclip_loss_with_ranks(x, y, scale, backend="reference")
    assert torch.equal(ranks.rows, expected.rows) and torch.equal(ranks.columns, expected.columns)


@pytest.mark.parametrize("name", ("hard", "psd"))
def test_memory_beyond_inputs_and_gradients(name):
    """64 MiB and 64 bytes a row; the gradients count with their fp32 sums, which the caller rounds to 16 bits."""
    n, d = 16384, 512
    x, y, scale = operands(n, n, d, torch.bfloat16)
    target = on_gpu(SQUARE_TARGETS[name](n, n))
    fused(x, y, scale, target)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused(x, y, scale, target)
    used = torch.cuda.max_memory_allocated() - before
    gradients = 2 * n * d * (2 + 4)
    temporaries = 3 * 8192 * d * 4  # ops.py works on the positives 8192 rows at a time
    assert used <= gradients + temporaries + 64 * 2**20 + 64 * n


def test_sampled_rows_beyond_two_to_the_31_elements():
    """N * D > 2^31: the last rows' gradients equal those of a dense computation on them alone."""
    d = 2048
    n = 2**31 // d + 1000
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16) / d**0.5
    y = unit_rows(64, d, dtype=torch.bfloat16).cuda()
    labels = torch.arange(n, device="cuda") % 64
    x.requires_grad_()
    scale = torch.tensor(10.0, device="cuda")
    losses = softclip_loss(x, y, scale, Hard(labels), reduction="none", backend="triton").rows
    (gradient,) = torch.autograd.grad(losses[-8:].sum(), x)
    rows = x[-8:].detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(10.0 * rows @ y.double().T, labels[-8:], reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), rows)
    torch.testing.assert_close(losses[-8:].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient[-8:].double(), expected_gradient, rtol=2e-2, atol=1e-4)
    assert not gradient[: n - 8].any()
