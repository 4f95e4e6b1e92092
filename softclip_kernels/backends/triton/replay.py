"""A pass that was recorded, launched again with other pointers.

To find out what a small problem's launches are takes the host several times as long as the GPU takes to run them. But
they follow from the kind of a pass: shapes, strides, dtypes, alignment, which operands are one, the device, and a few
settings. So the second pass of a kind is watched: which memory it allocates, and which kernels it launches with what.
Later ones do the same, with nothing decided again: vectors come from one piece of memory, matrices are allocated and
freed when they were, and of the arguments only pointers and `numbers` change. No tensor is kept from call to call.

A pass is recorded if it consists of launches and allocations. One with other operators (16-bit units of float16,
teachers' biases, torch's own products) is computed as ever, and so is what a dispatch mode or a captured graph sees.
Only SOFTCLIP_REPLAY=1 turns this on: on a GPU it has run for two losses so far (docs/triton.md).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from types import NoneType

import torch
from torch import Tensor, nn

from . import call, edges, launch
from .recorder import Recorder
from .recording import Recording

Compute = Callable[..., Sequence[Tensor | None]]

MOST = 64  # kinds that are remembered
ALIGNMENT = 16  # that kernels distinguish
SETTINGS = ("SOFTCLIP_CANDIDATE", "SOFTCLIP_AUTOTUNE", "SOFTCLIP_CUDA")

# By kind: None once it was seen, then its recording, or False where there can be none.
_recordings: dict[Hashable, Recording | bool | None] = {}
_recording = threading.Lock()


def run(
    name: str, tensors: Sequence[Tensor | None], rest: Hashable, compute: Compute, numbers: tuple[float, ...] = ()
) -> Sequence[Tensor | None]:
    """`compute(numbers)`, whose launches follow from the kind of the tensors, of which the first is on the current
    device, and from `rest`; what it returns is newly allocated. Numbers may change between passes of a kind."""
    if not _may_be_replayed(tensors):
        return compute(numbers)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    settings = *map(os.environ.get, SETTINGS), launch.SCRATCH, edges.most()
    kind = name, rest, settings, *_kinds(tensors, pointers)
    known = _recordings.get(kind, False)
    if isinstance(known, Recording):
        return known.follow(tensors, pointers, numbers)
    if known is None and _recording.acquire(blocking=False):
        try:
            return _recorded(kind, tensors, numbers, compute)
        finally:
            _recording.release()
    if kind not in _recordings:
        if len(_recordings) >= MOST:
            _recordings.clear()
        _recordings[kind] = None
    return compute(numbers)


_PLAIN = frozenset([Tensor, nn.Parameter, NoneType])


def _may_be_replayed(tensors: Sequence[Tensor | None]) -> bool:
    """Nobody sees what is allocated, captures a graph or says no."""
    if torch._C._len_torch_dispatch_stack() > 0 or not _PLAIN.issuperset(map(type, tensors)):
        return False
    first = tensors[0]
    assert first is not None
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return os.environ.get("SOFTCLIP_REPLAY") == "1"


def _kinds(tensors: Sequence[Tensor | None], pointers: list[int]) -> list[Hashable]:
    """Of each tensor what decides how kernels take it; and which of them are one."""
    kinds: list[Hashable] = [
        None
        if tensor is None
        else (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), pointer % ALIGNMENT)
        for tensor, pointer in zip(tensors, pointers, strict=True)
    ]
    kinds.append(tuple(map(pointers.index, pointers)))
    return kinds


def _recorded(
    kind: Hashable, tensors: Sequence[Tensor | None], numbers: tuple[float, ...], compute: Compute
) -> Sequence[Tensor | None]:
    numbers = tuple(number + 0.0 for number in numbers)  # objects of their own, by which they are found again
    recorder = Recorder(tensors, numbers)
    call.recorder = recorder
    try:
        with recorder:
            results = compute(numbers)
    finally:
        call.recorder = None
    if not recorder.interrupted:
        _recordings[kind] = recorder.recording(results) or False
    return results
