"""What a GPU's run and its tests reach of the kernels before anything is timed, counted without a GPU: launches are
stubbed (bench/stubbed.py)."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from unittest import mock

import pytest
import torch
from backends import test_triton_gpu
from helpers.backends import needs_triton

from bench import timing
from bench.gpu import compilation
from bench.gpu.goals import MIB
from bench.gpu.plan import SIZES, WIDTHS, Scale
from bench.gpu_tools import once
from bench.problems import LOSSES, Case
from softclip_kernels.testing import Result

pytestmark = needs_triton

TIMED = (Scale.first, (min(SIZES), max(WIDTHS)))  # larger ones launch the same, more often
EXCHANGE = "softmax_exchange_kernel"


class Launches:
    """What is launched within `noted`.

    variants   compiled for it: the kernel's name, and what it was specialized on
    launched   the kernels' names, with the arguments of every launch
    """

    def __init__(self):
        self.variants, self.launched, self._kernels = set(), [], set()

    @contextlib.contextmanager
    def noted(self):
        from bench import stubbed

        with stubbed.gpu(self.launched.append, lambda kernel, signature: self._kernels.add(kernel)):
            yield
            self.variants |= {(kernel.__name__, key) for kernel in self._kernels for key in kernel.device_caches[0][0]}

    def counts(self):
        return Counter(name for name, _, _ in self.launched)

    def parts(self):
        """Of every launch of an exchange, what it does."""
        from softclip_kernels.backends.triton.softmax_exchange import softmax_exchange_kernel

        place = softmax_exchange_kernel.arg_names.index("PART")
        return {arguments[place] for name, _, arguments in self.launched if name == EXCHANGE}


def _with_every_candidate(loss, size):
    found = Launches()
    case = Case(loss, torch.bfloat16, *size)
    fused, operands = case.fused("triton"), case.operands()
    with found.noted():
        for forced in compilation.candidates_of(case):
            with mock.patch.dict(os.environ, {compilation.FORCED: forced}):
                Result.of(fused, *operands)
        timing.forward_only(fused, *operands)()
    return found


@pytest.fixture(scope="module", params=LOSSES)
def timed(request):
    """A loss, and what the timed sizes launch of it, whichever candidates the tuner takes."""
    return request.param, [_with_every_candidate(request.param, size) for size in TIMED]


def test_smoke_and_compilation_take_every_variant_that_is_timed(timed):
    loss, others = timed
    with mock.patch.dict(os.environ, {MIB: Scale.smoke_mib}):
        checked = _with_every_candidate(loss, Scale.smoke)
    for other in others:
        assert not {name for name, _ in other.variants - checked.variants}
    assert checked.parts() == ({0, 1, 2, 3} if loss == "psd" else set())


def test_the_smoke_size_is_ragged_and_below_the_tuner():
    from softclip_kernels.backends.triton import tuning

    n, _ = Scale.smoke
    assert n % 16 and n**2 < tuning.WORTHWHILE


def test_the_gpu_tests_take_every_variant_that_is_timed(timed, monkeypatch):
    """With every candidate, and on several super-blocks."""
    (loss, others), found, counts = timed, Launches(), []
    monkeypatch.setattr(test_triton_gpu, "DEVICE", "cpu")

    def check(name, n, m, d, dtype):
        found.launched.clear()
        target = test_triton_gpu.target_of(name, n, m, d, dtype)
        test_triton_gpu.fused(*test_triton_gpu.operands(n, m, d, dtype), target)
        counts.append(found.counts())

    monkeypatch.setattr(test_triton_gpu, "check", check)
    for size in range(len(test_triton_gpu.CANDIDATES)):
        with found.noted():
            test_triton_gpu.test_every_candidate_tile(loss, size, torch.bfloat16, monkeypatch)
        _, *checks = counts  # the first finds the candidates
        assert checks
        for whole, cut in zip(checks[::2], checks[1::2], strict=True):
            assert all(whole[name] < cut[name] for name in whole if name.startswith("softmax"))
        counts.clear()
    for other in others:
        assert not {name for name, _ in other.variants - found.variants}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_sanitizer_looks_at_several_super_blocks(loss):
    whole, cut = Launches(), Launches()
    for found, options in ((whole, ()), (cut, (once.SMALL,))):
        with found.noted():
            once.main([loss, "bfloat16", *map(str, Scale.sanitized), "cpu", *options])
    for name in ("softmax_forward_kernel", "softmax_backward_kernel"):
        assert cut.counts()[name] > whole.counts()[name] == 1
