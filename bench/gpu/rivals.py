"""Other packages' fused losses as contenders, from wheels that were brought along: the machine has no network.

siglip-kernel   the sigmoid loss, so another function with the same products; its scale and bias are learnt
inf-cl          one direction of the softmax loss a call, so that two calls are the whole loss
memeff          the softmax loss, whose scale is a number that it does not learn; its gradients are checked
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import Row, timing
from ..problems import SCALE, Case, Loss
from .steps import check_close, why_not_timed


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


def memeff() -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # With stable=True gradients are of another size.
    module = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda x, y, scale: module(x, y)


RIVALS: dict[str, Callable[[], Loss]] = {"siglip-kernel": siglip_kernel, "inf-cl": inf_cl, "memeff": memeff}
FIXED_SCALE = ("memeff",)
Gradients = Callable[[], tuple[Tensor, ...]]


def compare(case: Case, folder: Path, rounds: int) -> Row:
    """The fused loss beside every rival whose wheel is in the folder. What a rival or a wheel fails with stands in its
    place."""
    x, y, scale = case.operands()
    fused = timing.forward_backward(case.fused("triton"), x, y, scale)
    fused()
    contenders: dict[str, Gradients] = {"fused": fused}
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
                    run = timing.forward_backward(make(), x, y, scale.detach() if name in FIXED_SCALE else scale)
                except Exception as error:
                    row[name] = f"failed: {type(error).__name__}: {error}"
                    continue
                why = why_not_timed(partial(_check_gradients, run, fused) if name in FIXED_SCALE else run, 0)
                if why is None:
                    contenders[name] = run
                else:
                    row[name] = why
            torch.cuda.synchronize()
            timings = timing.interleaved(contenders, rounds, 1, 0.0, timing.device_seconds)
        finally:
            sys.path.remove(unpacked)
    over = {f"over {name}": timings[name].median / timings["fused"].median for name in RIVALS if name in timings}
    return row | timings | over


def _check_gradients(rival: Gradients, fused: Gradients) -> None:
    for name, got, expected in zip(("dx", "dy"), rival(), fused(), strict=False):  # of the scale there may be none
        check_close(name, got, expected, against="the fused loss")
