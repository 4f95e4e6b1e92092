"""How the soft share alpha grows during training: pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from .. import checks


class Schedule(Protocol):
    def __call__(self, step: int) -> float:
        """alpha in [0, 1] at optimizer step `step`, counted from 0."""


@dataclass(frozen=True)
class Constant:
    value: float

    def __post_init__(self) -> None:
        checks.number_in("value", self.value, 0.0, 1.0)

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class _Ramp:
    """From `start` at step 0 to `end` at step `steps`, constant afterwards."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        checks.number_in("start", self.start, 0.0, 1.0)
        checks.number_in("end", self.end, 0.0, 1.0)
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * self._shape(min(max(step / self.steps, 0.0), 1.0))

    def _shape(self, progress: float) -> float:
        raise NotImplementedError


class Linear(_Ramp):
    def _shape(self, progress: float) -> float:
        return progress


class Cosine(_Ramp):
    """Half a cosine: flat at both ends."""

    def _shape(self, progress: float) -> float:
        return 0.5 * (1.0 - math.cos(math.pi * progress))


@dataclass(frozen=True)
class Step:
    """`values[k]` from step `milestones[k - 1]` on; `values[0]` before the first. One more value than milestones."""

    milestones: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.milestones) + 1 or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"milestones={self.milestones} must rise and values={self.values} must be one more than they are"
            )
        for value in self.values:
            checks.number_in("values", value, 0.0, 1.0)

    def __call__(self, step: int) -> float:
        return self.values[sum(step >= milestone for milestone in self.milestones)]


@dataclass(frozen=True)
class WarmUp:
    """0 for the first `steps` steps, then `after`, whose own step 0 is there."""

    steps: int
    after: Schedule

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must not be negative")

    def __call__(self, step: int) -> float:
        return 0.0 if step < self.steps else self.after(step - self.steps)
