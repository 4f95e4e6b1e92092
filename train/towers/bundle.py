"""What every kind of towers brings: a module, and how pictures and captions reach it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from .contrastive import Contrastive


class Prepare(Protocol):
    """Decoded pictures of any size and mode → (b, 3, H, W) float32, as the image tower takes them."""

    def __call__(self, images: Sequence[Image.Image], seeds: np.ndarray | None) -> Tensor:
        """`seeds`: (b,) int64, one for each picture, the only source of its augmentation's random numbers; None in an
        evaluation, without augmentation."""
        ...


@dataclass(frozen=True)
class Bundle:
    """A pair of towers, and all that goes with them, from the library that owns them.

    module           the towers, with fp32 parameters on the CPU
    prepare          pictures → the image tower's input; it runs in the data's worker processes
    tokenize         captions → (b, L) int64, cut and padded; likewise
    width            E, of the embeddings
    tokens_per_pair  patches of a picture and tokens of a caption, padding counted
    parameter_groups(weight_decay, layer_decay)
                     of the trained parameters, as torch's optimizers take them, with `lr_scale` where layers differ.
                     Weight decay for matrices and kernels only. Raises ConfigError where these towers know no layers
    files            what a checkpoint must hold, besides the weights, for the towers to be built again: by file name
    preprocessing    what `prepare` does in an evaluation, in the terms of the towers' library; JSON can hold it
    notes            what a person should know about them, each in one line; rank 0 says it
    """

    module: Contrastive
    prepare: Prepare
    tokenize: Callable[[Sequence[str]], Tensor]
    width: int
    tokens_per_pair: int
    parameter_groups: Callable[[float, float | None], list[dict[str, Any]]]
    files: dict[str, bytes] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
