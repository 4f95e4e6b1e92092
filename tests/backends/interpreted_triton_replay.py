"""Passes that are replayed (replay.py) compute what they computed before, in Triton's interpreter; its launches, whose
pointers are numbers then as a GPU's driver takes them, stand for a compiled kernel's. test_triton_replay.py runs this
file in a process of its own.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import driver

from softclip_kernels import Hard, Mix, SelfTeacher, Weighted
from softclip_kernels.backends.triton import call, recording, replay
from softclip_kernels.testing import ALL_TARGETS, Result, assert_as_accurate_as_dense, operands

N, D = 45, 40  # two tiles by one, or one by two, ragged


class Compiled:
    """What stands for a compiled kernel: knows which arguments are pointers, and of what dtype."""

    function = packed_metadata = None

    def __init__(self, kernel, dtypes, options):
        self.kernel, self.dtypes, self.options = kernel, dtypes, options

    def __getitem__(self, grid):
        return lambda *plain, stream=None: self.run(*grid, stream, None, None, None, None, None, *plain)

    def run(self, programs, *others):
        plain = others[8:]
        values = [
            _memory(value, dtype) if dtype and isinstance(value, int) else value
            for value, dtype in zip(plain, self.dtypes, strict=True)
        ]
        named = dict(zip(self.kernel.arg_names, values, strict=True))
        with _disable_current_modes():  # the interpreter copies, and a recorder would see it
            self.kernel[(programs,)](**named, **self.options)


def _memory(pointer, dtype):
    """Its first entry; a kernel reaches the others by its address."""
    buffer = (ctypes.c_char * dtype.itemsize).from_address(pointer or ctypes.addressof(_NOTHING))
    return torch.frombuffer(buffer, dtype=dtype)


_NOTHING = (ctypes.c_char * 16)()


class Kernel:
    """An interpreted kernel whose launch compiles it, so to speak."""

    def __init__(self, kernel):
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.do_not_specialize = _unspecialized(kernel)

    def __getitem__(self, grid):
        def run(**named):
            given = [named.pop(name) for name in self.arg_names]
            self.kernel[grid](**dict(zip(self.arg_names, given, strict=True)), **named)
            return Compiled(self.kernel, [getattr(each, "dtype", None) for each in given], named)

        return run


def _unspecialized(kernel):
    return getattr(kernel, "do_not_specialize", None) or kernel.kwargs.get("do_not_specialize", ())


class Driver:
    def get_current_stream(self, device):
        return 0


@pytest.fixture
def replayed(monkeypatch):
    """Counts the passes that follow a recording."""
    kernels, followed, follow, init = {}, [], recording.Recording.follow, call.Call.__init__

    def start(self, kernel, *others):
        init(self, kernels.setdefault(id(kernel), Kernel(kernel)), *others)

    def counted(self, *arguments):
        followed.append(self)
        return follow(self, *arguments)

    monkeypatch.setattr(call, "CompiledKernel", Compiled)
    monkeypatch.setattr(call, "_compiled", {})
    monkeypatch.setattr(call.Call, "__init__", start)
    monkeypatch.setattr(recording.Recording, "follow", counted)
    monkeypatch.setattr(replay, "_recordings", {})
    monkeypatch.setenv("SOFTCLIP_REPLAY", "1")
    monkeypatch.setattr(driver, "_active", Driver())
    return followed


def check(target, turns=3, **options):
    """Of other values, elsewhere, in every turn."""
    for turn in range(turns):
        x, y, scale = operands(N, N, D, scale=14.3 + turn)
        result = Result.of_loss(x, y, scale, target(turn), backend="triton", **options)
        assert_as_accurate_as_dense(result, x, y, scale, target(turn), **options)


# With what torch computes between launches a pass is none to replay.
@pytest.mark.parametrize("name", ALL_TARGETS)
def test_a_replayed_loss_is_as_accurate(replayed, name):
    made = ALL_TARGETS[name](N, N)
    check(lambda turn: made)
    if name in ("hard", "psd", "psd_external"):
        assert len(replayed) == 2  # forward with the loss, and backward, in the third turn


def test_numbers_are_those_of_now(replayed):
    """The share of a blend grows from step to step."""
    check(lambda turn: Mix(Hard(), SelfTeacher(5.0), 0.2 + 0.15 * turn))
    assert len(replayed) == 2


@pytest.mark.parametrize("direction", ("rows", "columns"))
def test_one_direction(replayed, direction):
    weights = torch.rand(N)
    labels = torch.randint(N, (N,))
    check(lambda turn: Weighted(Mix(Hard(labels), SelfTeacher(), weights), weights), direction=direction)
    assert len(replayed) == 1  # rows that share a column are scattered, by PyTorch


def test_every_direction_has_recordings_of_its_own(replayed):
    for direction in ("rows", "columns", "both"):
        check(lambda turn: Hard(), direction=direction)
    assert len(replayed) == 6
