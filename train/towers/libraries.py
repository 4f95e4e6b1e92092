"""What the towers of other libraries have in common: an import that may fail, files in a folder, and locks."""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..options import ConfigError
from .contrastive import Contrastive

RANDOM = "the {} tower begins with random weights"
BOTH_RANDOM = (RANDOM.format("image"), RANDOM.format("text"))
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


class LibraryModel(Contrastive):
    """A model of both towers. Its logit scale becomes `log_scale`. A bias of the logits, as SigLIP has, is left out: it
    has no effect under a softmax."""

    def __init__(self, model: Any, initial_scale: float | None) -> None:
        super().__init__()
        self.scale_shape = model.logit_scale.shape
        self.biased = getattr(model, "logit_bias", None) is not None
        self.log_scale = log_scale(model.logit_scale, initial_scale)
        del model.logit_scale
        if hasattr(model, "logit_bias"):
            del model.logit_bias
        self.model = model

    def library_state(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {name.removeprefix("model."): weight for name, weight in weights.items() if name != "log_scale"}
        state["logit_scale"] = weights["log_scale"].reshape(self.scale_shape)
        if self.biased:
            state["logit_bias"] = torch.zeros(self.scale_shape)
        return state


def library(name: str, extra: str, option: str = "model.towers") -> Any:
    """The module `name`, which `option` needs, or a ConfigError that says which extra of ours brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{option} needs the library {name}, which cannot be imported ({error}); install it by "
            f"pip install 'softclip-kernels[{extra}]'"
        ) from error


@contextmanager
def reporting(towers: str) -> Iterator[None]:
    """Whatever a library raises, because of names, options or files that it does not like, as a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model.towers={towers} cannot be made ({type(error).__name__}: {error}); change the name or path, "
            "model.options, or the other options of the model"
        ) from error


@contextmanager
def unpacked(files: Mapping[str, bytes] | None) -> Iterator[Path | None]:
    """A folder that holds these files while it is needed."""
    if files is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="towers-") as folder:
        for name, content in files.items():
            (Path(folder) / Path(name).name).write_bytes(content)
        yield Path(folder)


def packed(*savers: Callable[[str], Any]) -> dict[str, bytes]:
    """The files that these `save_pretrained` write, by name."""
    with tempfile.TemporaryDirectory(prefix="towers-") as folder:
        for save in savers:
            save(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def local_folder(path: str, file: str, towers: str) -> Path:
    """The folder `path`, which must hold `file`."""
    folder = Path(path).expanduser()
    if not (folder / file).is_file():
        raise ConfigError(
            f"model.towers={towers}: {folder} holds no {file}; allowed: a folder as the library saves it, or a copy of "
            "one on a hub. Nothing is fetched at run time"
        )
    return folder


def holds_weights(folder: Path) -> bool:
    return any(path.suffix in WEIGHTS for path in folder.iterdir())


def log_scale(before: Tensor, initial_scale: float | None) -> nn.Parameter:
    """The wrapper's (1,) parameter: option model.initial_scale, or else what the library has."""
    logarithm = float(before.detach()) if initial_scale is None else math.log(initial_scale)
    return nn.Parameter(torch.tensor([logarithm]))


@torch.no_grad()
def width(module: Contrastive, tokenize: Callable[[Sequence[str]], Tensor]) -> int:
    """E, as one caption shows it."""
    return module.eval().encode_texts(tokenize(["a"])).shape[1]


def timm_patches(trunk: Any, size: Sequence[int]) -> int:
    """Positions of the last maps or tokens of a timm model, for pictures of `size`."""
    return math.prod(side // trunk.feature_info[-1]["reduction"] for side in size)


def mark_locked(module: Contrastive, of_images: Iterable[nn.Parameter]) -> None:
    """Set `locked` by what is trained. All parameters but `of_images` and the scale are the text tower's."""
    images = list(of_images)
    not_texts = {id(parameter) for parameter in (*images, module.log_scale)}
    texts = [parameter for parameter in module.parameters() if id(parameter) not in not_texts]
    towers = enumerate((images, texts))
    module.locked = tuple(k for k, tower in towers if not any(parameter.requires_grad for parameter in tower))
