"""ONNX: each tower as a graph from its input to unit rows, for any number of pictures or captions.

image.onnx   `images`, (N, 3, H, W) float32 → `rows`, (N, E) float32;  its weights in image.onnx.data
text.onnx    `tokens`, (N, L) int64 → `rows`, (N, E) float32;  its weights in text.onnx.data
towers.json  H, W, L and E, the logit scale, and how pictures are prepared
towers/      the towers' own files, the tokenizer's among them
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from .. import checkpoint
from ..files import write_new
from ..towers import Bundle, Contrastive
from ..towers.libraries import library
from .portable import write_files

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
IMAGE, TEXT, DESCRIPTION = "image.onnx", "text.onnx", "towers.json"


class Rows(nn.Module):
    """One tower, `encode` of `towers`, to unit rows."""

    def __init__(self, towers: Contrastive, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.towers, self.encode = towers, encode

    def forward(self, inputs: Tensor) -> Tensor:
        return normalize(self.encode(inputs), dim=-1)


def write(folder: Path, bundle: Bundle, out: Path) -> None:
    """See Form.write."""
    for name in LIBRARIES:
        library(name, "onnx", "--to onnx")
    images, tokens = bundle.prepare([Image.new("RGB", (64, 64))] * 2, None), bundle.tokenize(["a"] * 2)
    module = bundle.module
    _write_graph(Rows(module, module.encode_images), "images", images, out / IMAGE)
    _write_graph(Rows(module, module.encode_texts), "tokens", tokens, out / TEXT)
    described = {
        "towers": checkpoint.read_config(folder).model.towers,
        "step": checkpoint.read_state(folder).step,
        "width": bundle.width,
        "logit_scale": float(module.log_scale.detach().exp()),
        "image": {"file": IMAGE, "size": list(images.shape[2:]), "preprocessing": bundle.preprocessing},
        "text": {"file": TEXT, "length": tokens.shape[1]},
    }
    write_new(out / DESCRIPTION, json.dumps(described, indent=1).encode())
    write_files(bundle, out)


def _write_graph(tower: nn.Module, name: str, sample: Tensor, path: Path) -> None:
    """`sample`: two inputs, since torch takes a batch of one for a constant."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch's of its own code
        torch.onnx.export(
            tower.eval(),
            (sample,),
            path,
            input_names=[name],
            output_names=["rows"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )


def rows(out: Path, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """See Form.rows."""
    return _run(out / IMAGE, "images", images), _run(out / TEXT, "tokens", tokens)


def _run(path: Path, name: str, inputs: Tensor) -> Tensor:
    session = library("onnxruntime", "onnx", "--to onnx").InferenceSession(path, providers=["CPUExecutionProvider"])
    (made,) = session.run(["rows"], {name: inputs.numpy()})
    return torch.from_numpy(cast(np.ndarray, made))
