"""Warnings about what is legal, and yet most likely not what was meant.

Each is shown once a process, and only where something learns: an evaluation may contrast what it likes. Values are
looked at in a process's first such call alone, so that a GPU waits once, in the call that tunes its kernels anyway.
"""

from __future__ import annotations

import math
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from .distributed.exchange import Layout

LARGEST_LOGARITHM = math.log(100)  # where CLIP stops its logit scale
NORMS = (0.95, 1.05)  # 16-bit embeddings of unit norm are off by 0.01

INSIDE = ("softclip_kernels", "torch")  # frames that a warning does not point at

_said: set[str] = set()
_looked = False


class WiringWarning(UserWarning):
    """The loss is called in a way that is legal and most likely not meant. A filter of the `warnings` module for this
    class says that it is."""


def alone(group: Any) -> None:
    """A job of several ranks, without `group`."""
    if torch.compiler.is_compiling() or group is not None or not (dist.is_available() and dist.is_initialized()):
        return
    if (ranks := dist.get_world_size()) > 1:
        _warn(
            "alone",
            f"this process is one of {ranks} ranks, but the loss was given no group=: each rank contrasts its own "
            f"pairs only. group='world' contrasts the pairs of all",
        )


def operands(x: Tensor, y: Tensor, logit_scale: Tensor | float) -> None:
    """Embeddings that nobody normalized; a logit scale that nobody exponentiated."""
    global _looked
    if _looked or not all(_readable(value) for value in (x, y, logit_scale)):
        return
    for name, embeddings in (("x", x), ("y", y)):
        norms = embeddings.detach().float().norm(dim=1)
        outside = (norms < NORMS[0]) | (norms > NORMS[1])
        if len(norms) and outside.float().mean() > 0.5:
            _warn(
                f"norm of {name}",
                f"the median norm of the embeddings {name} is {norms.median():.3g}, not 1: the logits are then no "
                f"cosines times the logit scale. Normalize them, for example F.normalize({name}, dim=1)",
            )
    if isinstance(logit_scale, nn.Parameter) and logit_scale.requires_grad:
        value = logit_scale.item()
        if value <= LARGEST_LOGARITHM:
            _warn(
                "logarithm",
                f"logit_scale is a trainable parameter of value {value:.4g}, which looks like the logarithm of one; "
                f"pass its exponential, logit_scale.exp()",
            )
    _looked = True


def labels(given: Tensor, layout: Layout) -> None:
    """Labels that count a rank's own columns, taken as those of the global batch."""
    after_others = layout.exchange is not None and layout.column_start > 0
    if not (after_others and torch.is_grad_enabled() and given.device.type == "cpu" and given.numel()):
        return
    if int(given.max()) < min(layout.m_local, layout.column_start):
        _warn(
            "labels",
            f"the labels of this rank's rows lie in [0, {layout.m_local}), so each names a column of another rank: "
            f"over ranks they count the columns of the global batch, where this rank's begin at {layout.column_start}. "
            f"Hard(labels, local=True) counts this rank's own",
        )


def rectangle(n: int, m: int) -> None:
    """The mean over columns, where rows and columns are no pairs."""
    if n != m and not torch.compiler.is_compiling():
        _warn(
            "rectangle",
            f"the batch has {n} rows and {m} columns: the loss is half the mean over rows plus half the mean over "
            f"columns, to which a column that no row matches adds nothing. The mean over rows alone, as in retrieval "
            f"with hard negatives, is direction='rows'",
        )


def bias() -> None:
    """A logit bias, which a softmax does not feel."""
    if not torch.compiler.is_compiling():
        _warn(
            "bias",
            "a softmax over logits does not feel logit_bias, which gets a gradient of zero: a model made for a sigmoid "
            "loss (SigLIP) is trained as a CLIP here",
        )


def _readable(value: Any) -> bool:
    """Not while a compiler traces, a graph is captured, or nothing has a value (fake and meta tensors)."""
    if torch.compiler.is_compiling():
        return False
    if not isinstance(value, Tensor):
        return True
    if type(value) not in (Tensor, nn.Parameter) or value.device.type == "meta":
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def _warn(key: str, message: str) -> None:
    if key not in _said:
        warnings.warn(message, WiringWarning, stacklevel=_outside())
        _said.add(key)  # not before: where a filter makes it an error, it is one at every call


def _outside() -> int:
    """How far up the caller of the library stands, for a warning that names the caller's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    return level
