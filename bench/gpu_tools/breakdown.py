"""Where the time of a forward and backward pass goes: by kernel, by phase, in gaps, on the host."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .. import Row, timing
from ..problems import Case

PHASES = {  # the first that a kernel's name begins with or, among its words, holds
    "statistics": r"softmax_forward|sums_kernel|online",
    "G": r"softmax_backward|softmax_exchange|softmax_gradient|coefficients",
    "products": r"products|gemm|cutlass|nvjet|sm90_|sm80_|ampere_",
}
REST = "rest"
PROFILED = 3  # passes


def breakdown(case: Case, seconds: float = 1.0) -> Row:
    """One row, all times in ms a pass:

    kernels   by name: [calls, ms], the longest first
    phases    ms of statistics, G, products and the rest
    wall ms   by the device's clock, without the profiler;  gaps ms: of these, those in which no kernel ran
    host ms   until the host has launched everything, without the profiler
    launches  calls of all kernels

    Raises RuntimeError where the profiler saw no kernel, as without the rights to: phases of nothing reach every goal.
    """
    run = timing.forward_backward(case.fused("triton"), *case.operands())
    for _ in range(2):  # compiles, and finds the tile shapes
        run()
    torch.cuda.synchronize()
    wall = timing.interleaved({"": run}, seconds=seconds, measure=timing.device_seconds)[""]
    host = timing.interleaved({"": run}, seconds=seconds, measure=_launching_seconds)[""]
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    spans = []
    for event in _events(case.device, run):
        kernels[event.name][0] += 1 / PROFILED
        kernels[event.name][1] += event.time_range.elapsed_us() / 1e3 / PROFILED
        spans.append((event.time_range.start, event.time_range.end))
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    phases = dict.fromkeys((*PHASES, REST), 0.0)
    for name, (_, ms) in kernels.items():
        phases[phase(name)] += ms
    return {
        "kind": "breakdown",
        **case.labels(),
        "wall ms": 1e3 * wall.median,
        "gaps ms": 1e3 * wall.median - covered(spans) / 1e3 / PROFILED,
        "host ms": 1e3 * host.median,
        "launches": sum(calls for calls, _ in kernels.values()),
        "phases": phases,
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1][1])),
    }


def phase(kernel: str) -> str:
    """A key of PHASES, or the rest: copies and element-wise kernels."""
    return next((name for name, pattern in PHASES.items() if re.search(pattern, kernel)), REST)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of them (start, end) lasts: kernels may overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _launching_seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    return timing.host_seconds(run)


def _events(device: str, run: Callable[[], object]) -> Iterator[Any]:
    """What ran on the device in PROFILED passes: on a GPU, kernels and copies; elsewhere PyTorch's operators."""
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return (event for event in profiler.events() or () if event.device_type == kind)
