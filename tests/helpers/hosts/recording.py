"""What a host's own loop did, seen from the optimizer, and how far two runs or two gradients are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from softclip_kernels.distributed.whole import full
from softclip_kernels.testing.exact_report import sizes


@dataclass
class Recording:
    """losses: one a step, as the test collects them; gradients: of the first step, as the optimizer meets them (after
    every reduction); parameters: as they are in the end. By the parameters' names."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0


class Recorder:
    """Records every optimizer in this process while it is entered. `named()`: the model's parameters, asked for at the
    first step, for a host may make its model late or replace its parameters."""

    def __init__(self, named: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        self.recording, self._named = Recording(), named

    def __enter__(self) -> Recording:
        self._hook = register_optimizer_step_pre_hook(self._before_step)
        return self.recording

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self.recording.steps:
            self.recording.gradients = {
                name: full(parameter.grad).clone() for name, parameter in self._named() if parameter.grad is not None
            }
        self.recording.steps += 1

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self.recording.parameters = {name: full(parameter.detach()).clone() for name, parameter in self._named()}


def against(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """For every parameter of `exact`: the gradient's part along the exact one, in units of it, and the size of the part
    beside it. A gradient below 1/1000 of all counts as of that size: of some, such as a key's bias in attention,
    nothing but rounding is left."""
    assert set(found) == set(exact), set(found) ^ set(exact)
    rights = {name: one.double().flatten() for name, one in exact.items()}
    result = {}
    for (name, right), size in zip(rights.items(), sizes(list(rights.values())), strict=True):
        seen = found[name].double().flatten()
        ratio = 1.0 if right.norm() < size else (seen @ right / (right @ right)).item()
        result[name] = (ratio, ((seen - ratio * right).norm() / size).item())
    return result


def furthest(one: Recording, other: Recording) -> float:
    """The largest difference of any entry of any parameter."""
    assert set(one.parameters) == set(other.parameters), set(one.parameters) ^ set(other.parameters)
    return max(
        (value.double() - other.parameters[name].double()).abs().max().item() for name, value in one.parameters.items()
    )
