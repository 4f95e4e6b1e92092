"""The multiprocessors' clock during each measurement, for shares at equal clock: products of large matrices draw more
power than a loss, and so run slower.

It is cycles over nanoseconds, both read on the multiprocessors before and after, as NVIDIA's nvbench does. nvidia-smi
takes longer to answer than a pass takes, so its readings (timing.Clocks) cannot be told apart by contender.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from .. import timing

Run = Callable[[], object]


class Clock:
    """Measures like timing.device_seconds; of every run the clock is kept, where it can be known: on NVIDIA's GPUs."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._megahertz: dict[Run, list[float]] = defaultdict(list)
        self.problem = ""  # why counters cannot be read
        self._read()

    def device_seconds(self, run: Run) -> float:
        before = self._read()
        seconds = timing.device_seconds(run)
        after = self._read()
        if before is not None and after is not None:
            self._megahertz[run] += megahertz(before, after)
        return seconds

    def of(self, run: Run) -> float | None:
        """The median, in MHz. None where it is not known."""
        return statistics.median(self._megahertz[run]) if self._megahertz[run] else None

    def _read(self) -> Tensor | None:
        """What goes wrong here must not cost the timing."""
        if not self.problem:
            try:
                return counters(self._device)
            except Exception as error:
                self.problem = f"{type(error).__name__}: {str(error)[:500]}"
        return None


def counters(device: str) -> Tensor:
    """(multiprocessors, 2) int64 on the CPU: cycles and nanoseconds, zeros for one that did not answer. Waits for the
    GPU."""
    if torch.version.hip:
        raise RuntimeError("only NVIDIA's GPUs have these counters")
    from . import counters_kernel  # here, for processes without triton

    found = torch.zeros(counters_kernel.SLOTS, 2, dtype=torch.int64, device=device)
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    counters_kernel.counters_kernel[(programs,)](found, SLOTS=counters_kernel.SLOTS, num_warps=1)
    return found.cpu()


def megahertz(before: Tensor, after: Tensor) -> list[float]:
    """The median over the multiprocessors that answered both times; [] where none did."""
    cycles, nanoseconds = (after - before).double().T
    known = (before > 0).all(1) & (after > before).all(1)
    return [1e3 * (cycles[known] / nanoseconds[known]).median().item()] if known.any() else []
