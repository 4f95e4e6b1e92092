"""A few steps of a host's loop, seen from its modules and its optimizer: what a process of this benchmark does."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import memory
from ..torchvision_beside_cpu import describe_torchvision
from .loops import STEPS, Loop


@dataclass
class Seen:
    """seconds: of every step but the first, from the first call of a module with parameters, when the batch is there,
    until the optimizer has stepped; peak: MiB by which the second step grew the process; parameters: of the optimizer,
    in the end."""

    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0
    parameters: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


class Watch:
    def __init__(self) -> None:
        self.seen = Seen()
        self.steps, self._began, self._resident = 0, 0.0, 0

    def begin(self, module: nn.Module, *_: Any) -> None:
        if self._began or next(module.parameters(), None) is None:  # torchvision's transforms are modules too
            return
        if self.steps == 1:
            memory.give_back()
            self._resident = memory.resident("VmRSS")
            memory.restart_peak()
        self._began = time.perf_counter()

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self.steps:  # the first one warms up
            self.seen.seconds.append(time.perf_counter() - self._began)
        if self.steps == 1:
            self.seen.peak = (memory.resident("VmHWM") - self._resident) / 2**20
        self.steps, self._began = self.steps + 1, 0.0
        if self.steps == STEPS:
            parameters = (each.detach().flatten() for group in optimizer.param_groups for each in group["params"])
            self.seen.parameters = torch.cat(list(parameters)).numpy()


def watch(loop: Loop, loss: str, n: int, threads: int) -> Seen:
    """STEPS steps of the loop. Raises RuntimeError where it made another number of them."""
    torch.set_num_threads(threads)
    describe_torchvision()
    watching = Watch()
    hooks: list[Any] = [
        register_module_forward_pre_hook(watching.begin),
        register_optimizer_step_post_hook(watching.after_step),
    ]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        logging.disable()
        loop.run(loss, n, Path(folder))
    for hook in hooks:
        hook.remove()
    if watching.steps != STEPS:
        raise RuntimeError(f"{loop.name} made {watching.steps} steps, not {STEPS}")
    return watching.seen
