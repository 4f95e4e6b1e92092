"""torchvision's wheel for CUDA beside a torch for CPUs, where `import torchvision` fails."""

from __future__ import annotations

import importlib.util

import torch

_operators: list[torch.library.Library] = []  # alive as long as the process


def describe_torchvision() -> None:
    """Before a library is imported that imports torchvision, such as open_clip: the wheel describes operators at its
    import that it then does not bring."""
    if _operators or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _operators.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _operators[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
