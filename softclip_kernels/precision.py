"""How PyTorch multiplies fp32 matrices, a product that its settings do not reach, a scope that autocast does not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def rounds_operands(device: torch.device) -> bool:
    """Whether torch's settings let products of fp32 matrices round their operands: to tf32, on CPUs also to bf16. torch
    2.9 has a setting for each device's products and one above it for everything ("none": not set), beside the older
    one, which it refuses to tell where the new ones disagree with it."""
    cuda = device.type == "cuda"
    own = torch.backends.cuda.matmul if cuda else getattr(torch.backends.mkldnn, "matmul", None)
    for settings in (own, torch.backends):
        chosen = getattr(settings, "fp32_precision", "none")
        if chosen != "none":
            return chosen == "tf32" or (chosen == "bf16" and not cuda)
    return torch.get_float32_matmul_precision() != "highest"


def unrounded_product(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y.T` of fp32 matrices, to fp32's accuracy whatever the settings are. Three parts of 8 bits hold the 24 of a
    number, and neither tf32 nor bf16 rounds them. The six products of parts that matter are one product of six times
    the width."""
    (x1, x2, x3), (y1, y2, y3) = _parts(x), _parts(y)
    return torch.cat([x1, x1, x2, x2, x1, x3], 1) @ torch.cat([y1, y2, y1, y2, y3, y1], 1).T


def _parts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of 8 bits, in fp32, whose sum is the matrix."""
    first = matrix.bfloat16().float()
    rest = matrix - first
    second = rest.bfloat16().float()
    return first, second, rest - second


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Costs nothing where autocast is off already."""
    off = device_type in ("cpu", "cuda") and not torch.compiler.is_compiling()  # not every device can be asked
    if off and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
