"""A trained model in the forms that others load: `python -m train export RUN --to FORM --out FOLDER`.

    open_clip    a folder for open_clip, of open_clip's models
    huggingface  a folder for transformers, of its CLIP and SigLIP models
    portable     safetensors and JSON alone, of any towers, which checkpoint.read_bundle reads
    onnx         each tower as a graph, of any towers

An export is loaded again by its own library and compared with the checkpoint before it gets its name: a library may
not hold all that was trained, and it is not seen in the files.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import checkpoint
from ..files import sync_file, sync_folder
from ..options import ConfigError
from ..towers import Bundle
from . import huggingface, onnx, open_clip, portable

TOLERANCE = 1e-5  # of unit rows, entry by entry: other orders of fp32 sums were seen to be 2e-7 apart at most
SHOWN = 300  # characters of another library's error
WAY_OUT = "nothing is kept. Export to another form"
CAPTIONS = ("a", "a photo of a red cat", "")


class ExportError(RuntimeError):
    """What was written does not give what the checkpoint gives; the message says how it was seen."""


@dataclass(frozen=True)
class Form:
    """One form of export.

    kinds    of towers that it can hold, as model.towers begins; empty: all
    write    (the checkpoint, its towers, an empty folder): fills the folder
    rows     (that folder, (n, 3, H, W) images, (n, L) tokens) → (n, E) unit rows of each, by the form's own library
    loading  how a person loads it, with {} for the folder
    """

    kinds: tuple[str, ...]
    write: Callable[[Path, Bundle, Path], None]
    rows: Callable[[Path, Tensor, Tensor], tuple[Tensor, Tensor]]
    loading: str


FORMS = {
    "open_clip": Form(
        ("open_clip",),
        open_clip.write,
        open_clip.rows,
        'model, preprocess = open_clip.create_model_from_pretrained("local-dir:{}")',
    ),
    "hf": Form(("hf",), huggingface.write, huggingface.rows, 'model = transformers.AutoModel.from_pretrained("{}")'),
    "safetensors": Form(
        (), portable.write, portable.rows, 'bundle = softclip_train.checkpoint.read_bundle(Path("{}"))'
    ),
    "onnx": Form((), onnx.write, onnx.rows, 'image = onnxruntime.InferenceSession("{}/image.onnx")'),
}


def export(folder: Path, form: str, out: Path) -> None:
    """Write the towers of the checkpoint `folder` to the new folder `out`, one of FORMS; whole or not at all. Raises
    ConfigError where the form cannot hold them, a library is missing, or `out` holds something; ExportError."""
    towers, chosen = checkpoint.read_config(folder).model.towers, FORMS[form]
    if chosen.kinds and towers.partition(":")[0] not in chosen.kinds:
        general = ", ".join(name for name, other in FORMS.items() if not other.kinds)
        raise ConfigError(f"--to {form} cannot hold model.towers={towers}; allowed for these: {general}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} is there, and is no empty folder; give another one")
    bundle = checkpoint.read_bundle(folder, compiled=False)
    with _whole(out) as scratch:
        with _reporting(f"--to {form} cannot write model.towers={towers}", ConfigError, OSError):
            chosen.write(folder, bundle, scratch)
        _compare(chosen, bundle, scratch)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its name at the end, flushed to disk; or goes."""
    out = out.absolute()
    scratch = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in scratch.rglob("*"):
            (sync_folder if path.is_dir() else sync_file)(path)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    sync_folder(out.parent)


@torch.no_grad()
def _compare(form: Form, bundle: Bundle, written: Path) -> None:
    """Raises ExportError where the rows of pictures and captions are not those of the checkpoint's towers."""
    noise = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 96, 128, 3), dtype=np.uint8)
    images, tokens = bundle.prepare([Image.fromarray(pixels) for pixels in noise], None), bundle.tokenize(CAPTIONS)
    x, y, _ = bundle.module(images, tokens)
    with _reporting("its own library does not load what was written"):
        loaded = form.rows(written, images, tokens)
    for tower, ours, theirs in zip(("image", "text"), (x, y), loaded, strict=True):
        apart = float((ours - theirs).abs().max())
        if not apart <= TOLERANCE:  # NaN neither
            raise ExportError(
                f"loaded again, the {tower} tower's rows are {apart:.1e} from the checkpoint's, more than {TOLERANCE}; "
                f"{WAY_OUT}"
            )


@contextmanager
def _reporting(words: str, *passed: type[Exception]) -> Iterator[None]:
    """Whatever a library raises, but `passed`, as an ExportError that begins with `words`."""
    try:
        yield
    except passed:
        raise
    except Exception as error:
        why = textwrap.shorten(str(error), SHOWN)
        raise ExportError(f"{words} ({type(error).__name__}: {why}); {WAY_OUT}") from error
