"""What the tests of the CPU kernels share."""

from __future__ import annotations

import pytest
import torch
from helpers import posed

from softclip_kernels.backends import cpu


@pytest.fixture(params=cpu.levels())
def level(request, monkeypatch):
    """Every instruction-set level of this machine."""
    monkeypatch.setenv(cpu.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture
def threads(monkeypatch):
    """Sets the number of threads, at first two, for problems of any size, without touching PyTorch's own."""

    def set_threads(count):
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        monkeypatch.setattr(cpu, "MULTIPLY_ADDS_PER_THREAD", dict.fromkeys(cpu.THREADS, 1))

    set_threads(2)
    return set_threads


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A Hopper GPU with a driver and a compiler, which the CPU's tensors are on (helpers/posed.py)."""
    with posed.hopper(monkeypatch, tmp_path) as machine:
        yield machine
        monkeypatch.undo()  # first: what a test has patched here was patched already
