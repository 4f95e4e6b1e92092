"""torch.compile as users run it, code generation included. (Graphs and fakes alone: test_ops.py.)"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._inductor import config as inductor_config

from softclip_kernels import softclip_loss
from softclip_kernels.testing import ALL_TARGETS, unit_rows

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for CPUs with a C++ compiler")


# Groups, whose sums are PyTorch's own operators around the kernel; and a self teacher of the swapped pair.
@pytest.mark.parametrize("name", ("groups_smoothing", pytest.param("psd", marks=pytest.mark.long)))
def test_inductor_gives_the_eager_loss_and_gradients(name, tmp_path, monkeypatch):
    """From the towers' last layer to the loss in one graph; compiled by an empty cache of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    n = 33
    target = ALL_TARGETS[name](n, n)
    images, texts = unit_rows(n, 6, dtype=torch.float32), unit_rows(n, 6, seed=1, dtype=torch.float32)
    leaves = unit_rows(6, 6, dtype=torch.float32).requires_grad_(), torch.tensor(10.0, requires_grad=True)

    def loss(weight, scale):
        return softclip_loss(torch.nn.functional.normalize(images @ weight, dim=1), texts, scale, target)

    torch.compiler.reset()
    with inductor_config.patch(compile_threads=1):  # here, not by processes that import torch once more
        compiled, eager = torch.compile(loss, fullgraph=True, backend="inductor")(*leaves), loss(*leaves)
    torch.testing.assert_close(compiled, eager)
    gradients = (torch.autograd.grad(one, leaves) for one in (compiled, eager))
    for got, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected)
    assert list(tmp_path.rglob("*.cpp")), "nothing was generated"
