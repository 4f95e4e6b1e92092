"""Other packages' fused losses as contenders, from wheels that were brought along: the machine has no network.

siglip-kernel   the sigmoid loss, so another function with the same products; its scale and bias are learnt
inf-cl          one direction of the softmax loss a call, so that two calls are the whole loss
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import Row, timing
from ..problems import Case, Loss
from .steps import why_not_timed


def siglip_kernel() -> Loss:
    from siglip_kernel import fused_siglip_loss

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return fused_siglip_loss(x, y, scale.log(), scale.new_full((), -10.0))

    return loss


def inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return (cal_flash_loss(x, y, scale=scale).mean() + cal_flash_loss(y, x, scale=scale).mean()) / 2

    return loss


RIVALS: dict[str, Callable[[], Loss]] = {"siglip-kernel": siglip_kernel, "inf-cl": inf_cl}


def compare(case: Case, folder: Path, rounds: int) -> Row:
    """The fused loss beside every rival whose wheel is in the folder. What a rival or a wheel fails with stands in its
    place."""
    x, y, scale = case.operands()
    contenders = {"fused": timing.forward_backward(case.fused("triton"), x, y, scale)}
    contenders["fused"]()
    row: Row = {}
    with tempfile.TemporaryDirectory() as unpacked:
        for wheel in sorted(folder.glob("*.whl")):
            try:
                zipfile.ZipFile(wheel).extractall(unpacked)
            except (OSError, zipfile.BadZipFile) as error:
                row[wheel.name] = f"failed: {type(error).__name__}: {error}"
        sys.path.insert(0, unpacked)
        try:
            for name, make in RIVALS.items():
                try:
                    run = timing.forward_backward(make(), x, y, scale)
                except Exception as error:
                    row[name] = f"failed: {type(error).__name__}: {error}"
                    continue
                why = why_not_timed(run, 0)
                if why is None:
                    contenders[name] = run
                else:
                    row[name] = why
            torch.cuda.synchronize()
            timings = timing.interleaved(contenders, rounds, 1, 0.0, timing.device_seconds)
        finally:
            sys.path.remove(unpacked)
    fused = timings["fused"].median
    return row | timings | {f"over {name}": timings[name].median / fused for name in RIVALS if name in timings}
