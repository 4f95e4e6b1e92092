"""open_clip's models: `open_clip:NAME`, with weights `open_clip:NAME:FILE`, or `open_clip:local-dir:FOLDER` of a folder
with an open_clip_config.json, as a hub's snapshot holds it and a checkpoint of ours too."""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..options import ConfigError, ModelOptions
from . import groups
from .bundle import Bundle
from .libraries import (
    BOTH_RANDOM,
    LibraryModel,
    holds_weights,
    library,
    local_folder,
    mark_locked,
    packed,
    timm_patches,
    width,
)
from .pictures import PerPicture

LOCAL = "local-dir:"
CONFIG = "open_clip_config.json"
STRIDE = 32  # of open_clip's own ResNets


class OpenClip(LibraryModel):
    """A model of open_clip's."""

    def encode_images(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model.encode_image(images, normalize=False))

    def encode_texts(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.model.encode_text(tokens, normalize=False))


def build(name: str, options: ModelOptions, saved: Path | None) -> Bundle:
    """`name`: what follows `open_clip:`; `saved`: a folder of the files of a checkpoint. See towers.build."""
    open_clip = library("open_clip", "open_clip")
    towers, fresh = options.towers, saved is None
    source, weights = _named(open_clip, name, towers) if fresh else (f"{LOCAL}{saved}", None)
    config = open_clip.get_model_config(source)
    _refuse_fetching(config | options.options, source, towers)
    with nullcontext() if fresh else _unwarned():
        model, training, evaluation = open_clip.create_model_and_transforms(
            source,
            weights,
            load_weights=fresh,
            pretrained_text=fresh,
            force_image_size=options.image_size,
            force_context_length=options.context_length,
            **options.options,
        )
    if hasattr(model, "text_decoder"):
        raise ConfigError(f"model.towers={towers} is a CoCa, whose decoder is not trained here; give a CLIP model")
    tokenize = open_clip.get_tokenizer(source, context_length=options.context_length)
    module = OpenClip(model, options.initial_scale)
    if options.lock != "none":
        getattr(model, f"lock_{options.lock}_tower")()
    mark_locked(module, model.visual.parameters())
    if options.gradient_checkpointing:
        if isinstance(model.visual, open_clip.model.ModifiedResNet):
            raise ConfigError(f"model.gradient_checkpointing=true with model.towers={towers}: its image tower has none")
        model.set_grad_checkpointing()
    trunk = getattr(model.visual, "trunk", None)  # of timm's
    without_layers = partial(groups.without_layers, module, towers=towers)
    return Bundle(
        module,
        PerPicture(training, evaluation),
        tokenize,
        width=width(module, tokenize),
        tokens_per_pair=_patches(model.visual, trunk) + tokenize.context_length,
        parameter_groups=without_layers if trunk is None else partial(groups.with_timm_layers, module, trunk),
        files=_files(config, model, tokenize),
        preprocessing=model.visual.preprocess_cfg,
        notes=() if saved or weights else BOTH_RANDOM,
    )


def _named(open_clip: Any, name: str, towers: str) -> tuple[str, str | None]:
    """The model as open_clip calls it, and the file or folder of its weights, if there is one."""
    if name.startswith(LOCAL):
        folder = local_folder(name.removeprefix(LOCAL), CONFIG, towers)
        return f"{LOCAL}{folder}", str(folder) if holds_weights(folder) else None
    name, _, weights = name.partition(":")
    known = open_clip.list_models()
    if name not in known:
        raise ConfigError(
            f"model.towers={towers}: open_clip has no model {name!r}; allowed: {LOCAL}FOLDER, or one of "
            f"open_clip.list_models(), such as {', '.join(difflib.get_close_matches(name, known) or known[:3])}"
        )
    if weights and not Path(weights).is_file():
        raise ConfigError(
            f"model.towers={towers}: {weights!r} is no file; allowed: a file of weights. The name of some on a hub is "
            "not, since nothing is fetched at run time"
        )
    return name, weights or None


def _refuse_fetching(config: dict[str, Any], source: str, towers: str) -> None:
    """Some models have their text tower or tokenizer from a hub."""
    text = config["text_cfg"]
    wanted = [text.get("hf_model_name"), None if source.startswith(LOCAL) else text.get("hf_tokenizer_name")]
    for name in filter(None, wanted):
        if not Path(name).is_dir():
            raise ConfigError(
                f"model.towers={towers} takes {name!r} from a hub, and nothing is fetched at run time; allowed: "
                f"open_clip:{LOCAL}FOLDER of a copy with its tokenizer, where hf_model_name, if any, is a folder too"
            )
    if config.get("pretrained_image"):
        raise ConfigError("model.options: pretrained_image fetches weights; give pretrained_image_path, a file")


@contextmanager
def _unwarned() -> Iterator[None]:
    """open_clip warns of random weights, which here wait for those of a checkpoint."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _patches(visual: Any, trunk: Any) -> int:
    if hasattr(visual, "grid_size"):
        return math.prod(visual.grid_size)
    size = visual.image_size if isinstance(visual.image_size, (tuple, list)) else (visual.image_size,) * 2
    return math.prod(side // STRIDE for side in size) if trunk is None else timm_patches(trunk, size)


def _files(config: dict[str, Any], model: Any, tokenize: Any) -> dict[str, bytes]:
    """As open_clip's own `local-dir:` reads them."""
    described = {"model_cfg": config, "preprocess_cfg": model.visual.preprocess_cfg}
    tokenizer = packed(tokenize.save_pretrained) if hasattr(tokenize, "save_pretrained") else {}
    return tokenizer | {CONFIG: json.dumps(described, indent=2).encode()}
