"""open_clip's own form: a folder that its `local-dir:` reads, and a file of weights for a model that it knows by name.

open_clip_model.safetensors  weights by open_clip's names: create_model(NAME, pretrained=THIS FILE) reads them, too
open_clip_config.json        the model and its preprocessing
tokenizer.json, ...          where its tokenizer is one of transformers'
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from .. import checkpoint
from ..files import write_new
from ..options import ModelOptions
from ..towers import Bundle
from ..towers.libraries import library
from ..towers.open_clip import CONFIG, LOCAL

WEIGHTS = "open_clip_model.safetensors"  # the first that open_clip looks for
FORCED = {"force_quick_gelu": "quick_gelu", "force_custom_text": "custom_text"}  # arguments that a configuration has


def write(folder: Path, bundle: Bundle, out: Path) -> None:
    """See Form.write."""
    for name, content in bundle.files.items():
        write_new(out / name, content)
    described = json.loads(bundle.files[CONFIG])
    _apply(checkpoint.read_config(folder).model, described["model_cfg"])
    write_new(out / CONFIG, json.dumps(described, indent=2).encode())
    weights = bundle.module.library_state(bundle.module.state_dict())
    save_file({name: weight.contiguous() for name, weight in weights.items()}, out / WEIGHTS, {"format": "pt"})


def _apply(options: ModelOptions, config: dict[str, Any]) -> None:
    """To open_clip's configuration of the model, what the run had on top: whoever loads it gives no options."""
    if options.image_size is not None:
        config["vision_cfg"]["image_size"] = options.image_size
    if options.context_length is not None:
        config["text_cfg"]["context_length"] = options.context_length
    arguments = inspect.signature(library("open_clip", "open_clip").create_model_and_transforms).parameters
    for name, value in options.options.items():
        if name in FORCED:
            config[FORCED[name]] = value or config.get(FORCED[name], False)
        elif name not in arguments:  # the model's own; all others are of preprocessing, or done once it is loaded
            config[name] = value


def rows(out: Path, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """See Form.rows."""
    model = library("open_clip", "open_clip").create_model_from_pretrained(f"{LOCAL}{out}", return_transform=False)
    model.eval()
    return normalize(model.encode_image(images), dim=-1), normalize(model.encode_text(tokens), dim=-1)
