"""How deep a call of the loss goes before it computes: every frame of ours from softclip_loss to a kernel.

python -m bench frames          prints them for the CPU's kernels and, interpreted, for Triton's
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import softclip_kernels

from .short_run import Failed, Worker

PATIENCE = 300.0
PACKAGE = Path(softclip_kernels.__file__).parent


def frames(backend: str) -> list[str]:
    """`module:function` of each frame of ours, outermost first, then the kernel itself: of the forward pass."""
    deepest: list[str] = []

    def look(frame: FrameType, event: str, argument: Any) -> None:
        kernel = _cpu_kernel(event, argument) if backend == "cpu" else _triton_kernel(frame, event)
        if kernel and not deepest:
            caller: FrameType | None = frame if event == "c_call" else frame.f_back
            deepest.extend([*_own(caller), kernel])

    x, scale = torch.nn.functional.normalize(torch.randn(32, 16), dim=1), torch.tensor(9.0)
    softclip_kernels.softclip_loss(x, x, scale, backend=backend)  # imports what is imported late
    sys.setprofile(look)
    try:
        softclip_kernels.softclip_loss(x, x, scale, backend=backend)
    finally:
        sys.setprofile(None)
    return deepest


def _own(frame: FrameType | None) -> list[str]:
    """The frames of this package that lead to `frame`. Where PyTorch's own stand between them, they are left out."""
    found = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            module = path.relative_to(PACKAGE).with_suffix("").as_posix()
            found.append(f"{module}:{frame.f_code.co_qualname}")
        frame = frame.f_back
    return found[::-1]


def _cpu_kernel(event: str, argument: Any) -> str | None:
    if event != "c_call" or argument.__name__ != "forward" or "softclip_kernels._cpu" not in str(argument.__module__):
        return None
    return "_cpu.forward (C++)"


def _triton_kernel(frame: FrameType, event: str) -> str | None:
    """Triton's own launcher, called with the kernel that takes the time."""
    if event != "call" or "triton/runtime" not in frame.f_code.co_filename or frame.f_code.co_name != "run":
        return None
    name = getattr(frame.f_locals.get("self"), "__name__", "")
    return f"{name} (Triton)" if name == "softmax_forward_kernel" else None


def main(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser(prog="python -m bench frames", description=__doc__.split("\n\n")[0]).parse_args(arguments)
    for name, interpret in (("cpu", "0"), ("triton", "1")):
        worker = Worker(environment={"TRITON_INTERPRET": interpret})
        try:
            found = worker.call(frames, {"backend": name}, PATIENCE)
            print(f"{name}: {len(found)} frames", *found, sep="\n  ")
        except Failed as failure:
            print(f"{name}: cannot run here: {failure}")
        finally:
            worker.end()
