"""What the second of two passes must find as the first one found it: random numbers and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def devices() -> list[torch.device]:
    """Where a model may draw random numbers, beside the CPU. Which of them it does cannot be seen from outside: it may
    be a function, hold its tensors in objects of any kind, or move what it is given. So it is every one that the
    process could compute on; to read their generators makes none of them wait."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return []
    is_initialized = getattr(torch.get_device_module(accelerator.type), "is_initialized", None)
    if is_initialized is None or not is_initialized():  # nothing of the process lies there
        return []
    return [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]


class RandomState:
    """The generators of the CPU and of `devices`, as they stand."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.others = {device: torch.get_device_module(device.type).get_rng_state(device) for device in devices()}

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others.items():
            torch.get_device_module(device.type).set_rng_state(state, device)


class Autocast:
    """Autocast as it stands, of the CPU and of the accelerator."""

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator()
        self.options: list[dict[str, Any]] = [
            {
                "device_type": kind,
                "enabled": torch.is_autocast_enabled(kind),
                "dtype": torch.get_autocast_dtype(kind),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            }
            for kind in ("cpu", *([] if accelerator is None else [accelerator.type]))
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        with ExitStack() as stack:
            for options in self.options:
                stack.enter_context(torch.autocast(**options))
            yield
