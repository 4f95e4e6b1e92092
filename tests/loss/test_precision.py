"""fp32 products where torch's settings let it round their operands."""

from __future__ import annotations

import pytest
import torch

from softclip_kernels import precision, softclip_loss_with_ranks
from softclip_kernels.testing import matching_rows, unit_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BITS = {"high": 11, "medium": 8}  # of an operand's significand, as tf32 and bf16 keep them


@pytest.fixture(params=BITS)
def rounded_products(monkeypatch, request):
    """torch's setting and what a device makes of it: operands cut off, as Hopper's tensor cores do with tf32."""
    matmul, dropped = torch.Tensor.__matmul__, 24 - BITS[request.param]

    def cut(matrix):
        return ((matrix.view(torch.int32) >> dropped) << dropped).view(torch.float32)

    def product(a, b):
        return matmul(cut(a.contiguous()), cut(b.contiguous()))

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_ranks_are_exact_where_products_are_rounded(backend, rounded_products):
    n = 129
    x = unit_rows(n, 16, dtype=torch.float32)
    y = matching_rows(x, noise=1.5)
    leaves = [one.clone().requires_grad_() for one in (x, y)]
    loss, ranks = softclip_loss_with_ranks(*leaves, torch.tensor(20.0), backend=backend)
    z = torch.einsum("id,jd->ij", x.double(), y.double())
    assert torch.equal(ranks.rows, (z > z.diagonal()[:, None]).sum(1))
    assert torch.equal(ranks.columns, (z > z.diagonal()[None, :]).sum(0))
    # The backward pass recomputes the logits: in the same precision, or probabilities do not sum to 1.
    exact = [one.double().requires_grad_() for one in (x, y)]
    expected = 20.0 * torch.einsum("id,jd->ij", *exact)
    expected = (expected.logsumexp(0) + expected.logsumexp(1)).mean() / 2 - expected.diagonal().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    # What is left is the rounding of G's own products.
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True):
        assert (one - other).norm() < 2.0**-6 * other.norm()


def test_unrounded_products_are_as_good_as_full_ones(rounded_products):
    x, y = (unit_rows(200, 300, seed=seed, dtype=torch.float32) for seed in (1, 2))
    exact = torch.einsum("id,jd->ij", x.double(), y.double())
    errors = [(product - exact).abs().max() for product in (precision.unrounded_product(x, y), x @ y.T)]
    assert errors[0] < 8 * torch.finfo(torch.float32).eps < errors[1]  # of norms 1 and 1


def test_products_follow_both_of_torchs_settings(monkeypatch):
    class Settings:
        fp32_precision = "none"

    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "matmul", Settings(), raising=False)
    for setting, rounds in (("highest", False), ("high", True), ("medium", True)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert precision.rounds_operands(GPU) == precision.rounds_operands(CPU) == rounds

    def refuse():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    for setting, on_gpu, on_cpu in (("ieee", False, False), ("tf32", True, True), ("bf16", False, True)):
        Settings.fp32_precision = setting
        assert [precision.rounds_operands(device) for device in (GPU, CPU)] == [on_gpu, on_cpu]
