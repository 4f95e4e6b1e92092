"""`python -m bench gpu` on a CPU, with tiny sizes: Triton's interpreter, and stand-ins for what only a GPU has. Times
are the CPU's, memory and clocks are made up.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .. import ROOT
from ..gpu_tools.probe import Sizes
from . import clock
from .plan import Scale

FREE = 150_000  # bytes: of the rehearsal's losses some fit in it and some do not


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._at - self._at)


def stand_ins() -> dict[str, Any]:
    """What takes the place of torch.cuda's own."""
    return {
        "Event": Event,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (FREE, 2 * FREE),
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
    }


def install() -> None:
    """In this process, for good."""
    vars(torch.cuda).update(stand_ins())
    vars(torch).update(compile=_uncompiled)
    vars(clock).update(counters=_counters)
    # Of what masks leave out the interpreter computes anything.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.")


def _uncompiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return function


def _counters(device: str) -> torch.Tensor:
    """Of one multiprocessor that runs at 1000 MHz."""
    now = time.perf_counter_ns()
    return torch.tensor([[now, now]])


SMALL = Scale(
    device="cpu",
    dtypes=(torch.float32,),  # the interpreter takes no other
    n=(64, 40),
    d=(32,),
    first=(64, 32),
    small=((40, 24),),
    standing=(40, 32),
    smoke=(65, 64),  # of the narrowest width that every candidate takes
    checked=(65, 24),
    repeats=2,
    memory=(64, 32),
    million=(40, 16),
    first_call=(40, 16),
    seconds=0.0,
    minutes=60.0,
    patience=10.0,
    gemm=32,
    probe=Sizes(gemm=32, block=16, width=8, copied=4096, cached=1024),
    sanitized=(65, 32),
    suite=ROOT / "tests" / "benchmarks" / "test_gpu_suite.py",  # the GPU's tests, on small sizes
    prepare=install,
    environment={"TRITON_INTERPRET": "1"},
)
