"""Checkpoints without a job: what a run of two ranks would have written."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from train import checkpoint, towers
from train.config import Config
from train.files import sha256_of
from train.fingerprint import Fingerprint

from .data import tiny

FINGERPRINT = Fingerprint("data", "code", {"torch": "1"}, {"heldout": "other"})


@functools.cache
def weights(step: int, data: Path, tokenizer: bytes) -> dict[str, torch.Tensor]:
    """Made once, before a fork writes them: threads of torch's would be missing there."""
    torch.manual_seed(step)
    model = Config.from_dict(tiny(data)).model
    return towers.build(model, tuple, files={"tokenizer.json": tokenizer}).module.state_dict()


def junk(engine: Path) -> None:
    (engine / "rank0.pt").write_bytes(b"optimizer" * 8)


def write_checkpoint(
    run: Path,
    data: Path,
    files: Mapping[str, bytes],
    step: int,
    on: Callable[[Path], Any] = lambda scratch: None,
    engine: Callable[[Path], Any] = junk,
    keep: int = 2,
    keep_every: int = 0,
) -> Path:
    """`on` is called with the empty scratch folder, `engine` with that of DeepSpeed's files, which it fills."""
    scratch = checkpoint.begin(run, step)
    on(scratch)
    (scratch / checkpoint.ENGINE).mkdir()
    engine(scratch / checkpoint.ENGINE)
    tensors = weights(step, data, files["tokenizer.json"])
    config, state = Config.from_dict(tiny(data)), checkpoint.State(step, 0, 2, 1)
    checkpoint.write_portable(scratch, tensors, config, files, state, FINGERPRINT)
    return checkpoint.commit(run, scratch, step, keep, keep_every)


class Payload:
    """Pickled, it is a call that makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def altered(whole_run: Path, run: Path, before: str, after: str) -> Path:
    """The run's checkpoints under a configuration in which `after` stands for `before`."""
    run.mkdir()
    (run / "config.yaml").write_text((whole_run / "config.yaml").read_text().replace(before, after))
    (run / checkpoint.FOLDER).symlink_to(whole_run / checkpoint.FOLDER)
    return run


def rewrite_manifest(folder: Path) -> None:
    """As someone would who changed a checkpoint on purpose: the sums are right again."""
    entries = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for path in folder.rglob("*")
        if path.is_file() and path.name != checkpoint.MANIFEST
    }
    (folder / checkpoint.MANIFEST).write_text(json.dumps(entries), encoding="utf-8")


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / checkpoint.FOLDER).iterdir())
