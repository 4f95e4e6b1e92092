"""safetensors: what of a checkpoint is safe to share and needed to build its towers, which are of any kind.

model.safetensors  every weight, by its name in the module of the towers, and log_scale
config.json        the run's options
state.json         after how many steps
fingerprint.json   of the data, the code and the versions
towers/            the towers' own files, such as a tokenizer
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from .. import checkpoint
from ..files import write_new
from ..towers import Bundle


def write(folder: Path, bundle: Bundle, out: Path) -> None:
    """See Form.write."""
    for name in (checkpoint.WEIGHTS, checkpoint.CONFIG, checkpoint.STATE, checkpoint.FINGERPRINT):
        if (folder / name).exists():  # earlier versions wrote no fingerprint
            shutil.copyfile(folder / name, out / name)
    write_files(bundle, out)


def write_files(bundle: Bundle, out: Path) -> None:
    """The towers' own files, in a folder of their own as in a checkpoint."""
    (out / checkpoint.TOWERS).mkdir()
    for name, content in bundle.files.items():
        write_new(out / checkpoint.TOWERS / name, content)


def rows(out: Path, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """See Form.rows."""
    x, y, _ = checkpoint.read_bundle(out, compiled=False).module(images, tokens)
    return x, y
