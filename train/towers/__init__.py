"""The two towers, whoever's they are: `build` makes the ones that model.towers asks for.

bundle       what every kind of towers brings
contrastive  images and tokens to unit rows and the logit scale
small        the towers of the emoji run: model, tokenizer, augmentation
open_clip    open_clip's models
huggingface  transformers' CLIP and SigLIP models
timm         a timm image tower beside a transformers text tower
custom       a module of anyone's
groups       parameter groups;  libraries, pictures: what the kinds have in common
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch.nn.modules.batchnorm import _BatchNorm

from ..options import ConfigError, ModelOptions
from . import custom, huggingface, open_clip, small, timm
from .bundle import Bundle, Prepare
from .contrastive import MAX_LOG_SCALE, Contrastive
from .libraries import reporting, unpacked

__all__ = ["FORMS", "MAX_LOG_SCALE", "Bundle", "Contrastive", "Prepare", "build"]

FORMS = (
    "small",
    "open_clip:NAME[:FILE OF WEIGHTS]",
    "open_clip:local-dir:FOLDER",
    "hf:FOLDER",
    "timm:NAME+hf:FOLDER",
    "python:PACKAGE.MODULE:FACTORY",
)
LIBRARIES = {"open_clip": open_clip.build, "hf": huggingface.build, "timm": timm.build}


def build(
    options: ModelOptions,
    captions: Callable[[], Iterable[str]],
    precision: str = "fp32",
    files: Mapping[str, bytes] | None = None,
) -> Bundle:
    """The towers of model.towers, in training mode.

    captions   gives the training captions, of which `small` learns its tokenizer
    precision  of the autocast: bf16, fp16 or fp32
    files      a checkpoint's (Bundle.files): nothing is learned or loaded but them, and weights are to follow

    Raises ConfigError where the form is unknown, a library is missing or refuses what it is given.
    """
    kind, _, name = options.towers.partition(":")
    if options.towers == "small":
        bundle = small.build(options, captions, files)
    elif kind == "python" and ":" in name:
        bundle = custom.build(name, options)
    elif kind in LIBRARIES and name:
        with reporting(options.towers), unpacked(files) as saved:
            bundle = LIBRARIES[kind](name, options, saved)
    else:
        raise ConfigError(f"model.towers={options.towers!r}; allowed: {', '.join(FORMS)}")
    # From here on tokenizers start no threads, which would not outlive the fork of the data's workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    module = bundle.module
    module.precision = precision
    module.train()
    if options.compile:
        module.compile_towers()
    notes = bundle.notes
    if options.lock != "none" and not module.locked:
        notes += (f"model.lock={options.lock} locks a part of that tower; what follows it is trained",)
    if any(isinstance(part, _BatchNorm) and part.training for part in module.modules()):
        notes += ("batch norm: the loss depends on how a batch is cut into processes and micro-batches",)
    return replace(bundle, notes=notes)
