"""A target that changes with the optimizer's steps, in training loops that tell the loss of none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from .. import checks
from .base import Target, check_target
from .context import Context
from .lowered import LoweredTarget

KEY = "softclip_kernels_steps"  # in an optimizer's first parameter group

MakeTarget = Callable[[int, int], Target]

_counted: WeakSet[Optimizer] = WeakSet()


@dataclass(frozen=True)
class EachStep(Target):
    """The target `make(step, n)` of the step that `steps()` says, for whatever batch of n pairs it meets (over ranks,
    of the global batch).

        target = EachStep(psd.at, OptimizerSteps(optimizer))            # a ProgressiveSelfDistillation
        target = EachStep(psd.at, lambda: trainer.state.global_step)    # where the host counts

    All micro-batches that are accumulated for one step get one target, as long as they are of one size. Ranks that
    stand at different steps are an error on all. Not traced by torch.compile: a graph breaks here.
    """

    make: MakeTarget
    steps: Callable[[], int]

    def __post_init__(self) -> None:
        for name in ("make", "steps"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be callable, such as psd.at and OptimizerSteps(optimizer)")

    def lower(self, context: Context) -> LoweredTarget:
        # Not as a decorator, which would import the compiler, and Triton with it, with this module.
        lower = torch.compiler.disable(self._lower) if torch.compiler.is_compiling() else self._lower
        return lower(context)

    def _lower(self, context: Context) -> LoweredTarget:
        step = checks.whole_number("the step", self.steps())
        target = self.make(step, context.layout.n)
        check_target("what make(step, n) returns", target)
        return replace(target.lower(context), step=step)


def at_each_step(target: Target | MakeTarget | None, steps: Callable[[], int]) -> Target | None:
    """Of what an adapter takes as a target: make(step, n) becomes the target of the step that `steps()` says, and a
    Target or None stays what it is. Raises TypeError for anything else."""
    if target is None or isinstance(target, Target):
        return target
    if not callable(target):
        raise TypeError(
            f"target is a {type(target).__name__}; allowed: None, a Target, or make(step, n) that returns one, such as "
            f"psd.at of a ProgressiveSelfDistillation"
        )
    return EachStep(target, steps)


class OptimizerSteps:
    """Called, how many steps the optimizer has made: true ones, whatever was accumulated for them, and without those
    that a GradScaler skipped.

    The count is kept in the optimizer's first parameter group, so it is saved and loaded with the optimizer's
    state_dict, and goes on after a resume. Copies count the same optimizer; a pickle keeps the count alone.

    optimizer  a torch.optim.Optimizer; None: given later, to `follow`, and 0 until then
    """

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self._group: dict[str, Any] = {KEY: 0}
        self._optimizer: Optimizer | None = None
        if optimizer is not None:
            self.follow(optimizer)

    def follow(self, optimizer: Optimizer) -> None:
        """Count this optimizer's steps from now on; one whose steps are counted already keeps its count."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; allowed: a torch.optim.Optimizer. Where an engine or a "
                f"trainer wraps it, give EachStep a function that returns the host's own count"
            )
        optimizer.param_groups[0].setdefault(KEY, self())
        self._optimizer = optimizer
        if optimizer not in _counted:
            optimizer.register_step_post_hook(_count)
            _counted.add(optimizer)

    def __call__(self) -> int:
        group = self._group if self._optimizer is None else self._optimizer.param_groups[0]
        if KEY not in group:
            raise RuntimeError(
                "the state that was loaded into the optimizer does not say how many steps it has made: it was saved "
                "without OptimizerSteps. Say it once with set(steps)"
            )
        return group[KEY]

    def set(self, steps: int) -> None:
        """Let the optimizer have made this many steps."""
        group = self._group if self._optimizer is None else self._optimizer.param_groups[0]
        group[KEY] = checks.whole_number("steps", steps)

    def __deepcopy__(self, memo: Any) -> OptimizerSteps:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _with, (self(),)

    def __repr__(self) -> str:
        return f"OptimizerSteps({type(self._optimizer).__name__}: {self()})"


def _with(steps: int) -> OptimizerSteps:
    counter = OptimizerSteps()
    counter.set(steps)
    return counter


def _count(optimizer: Optimizer, *_: Any) -> None:
    if KEY in optimizer.param_groups[0]:
        optimizer.param_groups[0][KEY] += 1
