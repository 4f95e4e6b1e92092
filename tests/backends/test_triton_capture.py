"""What a CUDA graph can hold of a loss, without a GPU: the meta device stands for one, and kernels are launched without
a driver. On a GPU: test_triton_gpu.py::test_a_cuda_graph_replays_the_loss."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from helpers import interpreter
from helpers.backends import needs_triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softclip_kernels import Target, ops, softclip_loss
from softclip_kernels.testing import ALL_TARGETS

pytestmark = needs_triton

DEVICE = torch.device("meta")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZE = 300


class Captured(TorchDispatchMode):
    """Refuses copies between host and device; meta itself has no values to give to the host. It looks into the custom
    operators too."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace == "softclip":
            with self:
                return getattr(ops, f"run_{name}")(*arguments)
        result = function(*arguments, **(options or {}))
        devices = {t.device for t in tree_leaves((arguments, options, result)) if _on_a_device(t)}
        assert len(devices) <= 1, f"{name} copies between {devices}"
        return result


def _on_a_device(value: Any) -> bool:
    """Not a number that PyTorch made a tensor for."""
    return isinstance(value, torch.Tensor) and (value.dim() > 0 or value.device == DEVICE)


def _refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("no CUDA graph can hold this")


def _addmm(total: torch.Tensor, *_: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor) -> torch.Tensor:
    return out  # with out_dtype it exists on CUDA alone


def _no_autocast(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()  # meta has none


def launches() -> dict[str, list[int]]:
    """How many kernels every target launches in forward and backward, captured after a warm-up, in each dtype."""
    from backends.test_triton_gpu import moved
    from helpers import undriven

    from softclip_kernels.backends.triton import launch

    add_product = launch.add_product
    undriven.install()
    launch.add_product = add_product  # no kernel of ours, and to be captured too
    launch.SCRATCH = 2**16  # several super-blocks
    vars(torch).update(addmm=_addmm, autocast=_no_autocast)
    launch._in_place.update({(dtype, DEVICE): True for dtype in DTYPES})
    return {
        name: [_captured(moved(make(SIZE, SIZE), DEVICE), dtype, undriven) for dtype in DTYPES]
        for name, make in ALL_TARGETS.items()
    }


def _captured(target: Target, dtype: torch.dtype, undriven: Any) -> int:
    x, y = (torch.empty(SIZE, 64, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
    scale = torch.empty((), device=DEVICE, requires_grad=True)

    def step() -> None:
        with Captured():
            loss = softclip_loss(x, y, scale, target, backend="triton")
            torch.autograd.grad(loss, (x, y, scale))

    step()
    compiled, from_host = len(undriven.compiled), (torch.tensor, torch.from_numpy)
    undriven.noted.clear()
    torch.tensor = torch.from_numpy = _refused
    step()
    torch.tensor, torch.from_numpy = from_host
    assert len(undriven.compiled) == compiled, "kernels are compiled after the warm-up"
    return len(undriven.noted)


def test_a_warm_loss_copies_nothing_from_the_host_and_compiles_nothing():
    launched = interpreter.result_of("backends.test_triton_capture", "launches")
    assert launched.keys() == ALL_TARGETS.keys()
    assert all(min(counts) > 2 for counts in launched.values())


def test_addition_in_place_is_not_tried_during_capture(monkeypatch):
    """The trial waits for the GPU. What it said before holds."""
    from softclip_kernels.backends.triton import launch

    gpu, trials = torch.device("cuda"), []
    capturing = iter((True, False, True, True))
    monkeypatch.setattr(launch, "_in_place", {})
    monkeypatch.setattr(launch, "_added_in_place", lambda *kind: trials.append(kind) or True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(capturing))
    answers = [launch._adds_in_place(torch.bfloat16, gpu) for _ in range(3)]
    assert answers == [False, True, True] and trials == [(torch.bfloat16, gpu)]
    assert not launch._adds_in_place(torch.float16, gpu)
