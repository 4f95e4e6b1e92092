"""backends/test_triton_gpu.py as far as a machine without a GPU goes: on small sizes, with another backend and
stand-ins for the device."""

from __future__ import annotations

import contextlib

import pytest
import torch
from backends import test_triton_gpu

from bench.gpu import rehearsal
from bench.problems import LOSSES
from softclip_kernels import softclip_loss
from softclip_kernels.testing import ALL_TARGETS, RECTANGULAR_TARGETS, SQUARE_TARGETS, dense_loss


@pytest.mark.parametrize("name", ALL_TARGETS)
def test_targets_and_losses_stay_on_their_device(name, monkeypatch):
    """The meta device stands for CUDA: like it, it takes no tensor of the CPU with one dimension or more. Targets are
    moved as the GPU tests move them."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: contextlib.nullcontext())  # meta has none
    n = 6
    target = test_triton_gpu.moved(ALL_TARGETS[name](n, n), "meta")
    x, y = (torch.empty(n, 5, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scale = torch.empty((), device="meta", requires_grad=True)
    for loss in (dense_loss(x, y, scale, target), softclip_loss(x, y, scale, target)):
        gradients = torch.autograd.grad(loss, (x, y, scale))
        assert [one.device.type for one in (loss, *gradients)] == ["meta"] * 4


@pytest.fixture
def on_a_processor(monkeypatch):
    for name, value in vars(_Small).items():
        if name.isupper():
            monkeypatch.setattr(test_triton_gpu, name, value)
    for name, value in (rehearsal.stand_ins() | _STREAMS).items():
        monkeypatch.setattr(torch.cuda, name, value)
    # What there is without Triton's tiles.
    monkeypatch.setattr(test_triton_gpu.candidates, "every", lambda run, monkeypatch: [run()])
    monkeypatch.setattr(test_triton_gpu.candidates, "small_super_blocks", contextlib.nullcontext)
    monkeypatch.setattr(test_triton_gpu, "by_the_cuda_kernels", lambda *_, **others: contextlib.nullcontext())


_STREAMS = {"Stream": lambda: None, "stream": contextlib.nullcontext, "_sleep": lambda cycles: None}


class _Small:
    DEVICE, BACKEND = "cpu", "chunked"
    SQUARE_SIZES, RECTANGULAR_SIZES = ((1, 3), (50, 8)), ((1, 4, 8), (50, 30, 8))
    HOPPER_SIZES = ((1, 8), (50, 8))
    SCALED, SUPER_BLOCKS, MEMORY = (50, 8), (60, 8), (40, 8)
    CANDIDATES, REPEATED, CAPTURED, LAID_OUT, UNINITIALIZED = ((50, 8),), ((50, 8),), (50, 8), (50, 8), ((50, 8),)
    MUTATED = (129, 40)
    REPEATS = 2


@pytest.mark.parametrize("dtype", test_triton_gpu.DTYPES)
def test_the_gpu_tests_run_through_on_a_processor(on_a_processor, monkeypatch, dtype):
    """With small sizes and the chunked backend, which takes the same dtypes."""
    for name in SQUARE_TARGETS:
        test_triton_gpu.test_square_targets(name, dtype)
    for name in RECTANGULAR_TARGETS:
        test_triton_gpu.test_rectangular_targets(name, dtype)
    test_triton_gpu.test_scales("psd_block", 300.0, dtype)
    if dtype != torch.float32:
        for name in ("hard", "psd_teacher"):
            test_triton_gpu.test_square_targets_by_the_cuda_kernels(name, dtype, monkeypatch)
            test_triton_gpu.test_scales_by_the_cuda_kernels(name, 100.0, dtype, monkeypatch)
    test_triton_gpu.test_super_blocks("psd", dtype)
    test_triton_gpu.test_every_mutant_is_refused("psd_external", dtype)
    for case in ("huge", "identical", "opposite", "zero row"):
        test_triton_gpu.test_adversarial_values(case, dtype)
    test_triton_gpu.test_ranks(dtype)
    for name in ("hard", "psd_teacher", "labels", "groups"):
        test_triton_gpu.test_repeats_are_bitwise_equal(name, monkeypatch)
    for name in LOSSES:
        test_triton_gpu.test_every_candidate_tile(name, 0, dtype, monkeypatch)
    for name in ("hard", "psd", "psd_external"):
        test_triton_gpu.test_a_cuda_graph_replays_the_loss(name, dtype, "", monkeypatch)
        test_triton_gpu.test_a_loss_stays_on_its_stream(name)
        test_triton_gpu.test_fresh_memory_is_never_read(name, dtype)
        for layout in test_triton_gpu.LAYOUTS:
            test_triton_gpu.test_layouts_of_operands(layout, name, dtype, "", monkeypatch)
    test_triton_gpu.test_memory_beyond_inputs_and_gradients(monkeypatch, "psd", 64)
    test_triton_gpu.check_last_rows(100, 32)
