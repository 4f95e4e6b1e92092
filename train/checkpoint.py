"""Checkpoints that a crash cannot spoil.

A checkpoint is a folder ``checkpoints/step-000120``:

    model.safetensors  config.json  tokenizer.json  state.json    safe to share: no code in them
    engine/                                                       DeepSpeed's own, a file a rank, for resuming
    manifest.json                                                 SHA-256 and size of all others

It is written under another name, flushed to disk, and renamed; ``checkpoints/latest`` is written last. Whoever reads
checks the manifest and falls back to the newest checkpoint that is whole. ``engine/`` is read with pickle by DeepSpeed:
resume only runs you trust. Evaluation and other users read safetensors and JSON only.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from tokenizers import Tokenizer

from train.config import Config
from train.files import sha256_of, sync_file, sync_folder, write_atomically
from train.model import Clip

FOLDER, LATEST, MANIFEST, ENGINE = "checkpoints", "latest", "manifest.json", "engine"
WEIGHTS, CONFIG, TOKENIZER, STATE = "model.safetensors", "config.json", "tokenizer.json", "state.json"
NAME = re.compile(r"step-[0-9]{6,}")


class CheckpointError(RuntimeError):
    """No checkpoint can be used; the message says why and what to do."""


@dataclass(frozen=True)
class State:
    """What a run knows besides parameters: ``step`` steps are done (skipped ones count), by how many processes."""

    step: int
    skipped: int
    processes: int
    zero_stage: int


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def begin(run: Path, step: int) -> Path:
    """An empty scratch folder for the checkpoint of `step`, on the same file system; leftovers of a crash go."""
    for left in (run / FOLDER).glob(".*.tmp"):  # one process writes here at a time
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    scratch = run / FOLDER / f".{name_of(step)}.tmp"
    scratch.mkdir(parents=True)
    return scratch


def write_portable(
    folder: Path, weights: dict[str, torch.Tensor], config: Config, tokenizer: Tokenizer, state: State
) -> None:
    """Weights, configuration, tokenizer and state, none of which can run code."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    (folder / WEIGHTS).write_bytes(save_safetensors(tensors))
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=1), encoding="utf-8")
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / STATE).write_text(json.dumps(state.__dict__), encoding="utf-8")


def commit(run: Path, scratch: Path, step: int, keep: int, at: Callable[[str], None] = lambda point: None) -> Path:
    """Make a written scratch folder the latest checkpoint and remove all but `keep`. `at` is told each point reached
    (tests crash there)."""
    entries = {}
    for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
        entries[path.relative_to(scratch).as_posix()] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        sync_file(path)
    at("files flushed")
    write_atomically(scratch / MANIFEST, json.dumps(entries, indent=1).encode())
    at("manifest written")
    final = run / FOLDER / name_of(step)
    if final.exists():  # a damaged one that a resumed run passes again
        shutil.rmtree(final)
    at("old removed")
    scratch.rename(final)
    sync_folder(final.parent)
    at("renamed")
    write_atomically(run / FOLDER / LATEST, f"{final.name}\n".encode())
    at("latest written")
    for old in _names(run)[keep:]:
        if old != final.name:
            shutil.rmtree(run / FOLDER / old, ignore_errors=True)
    return final


def find(run: Path, warn: Callable[[str], None] = print) -> Path:
    """The newest whole checkpoint: ``latest``, or, with a warning, the newest of the others that is whole."""
    try:
        latest = (run / FOLDER / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        latest = ""
    names = _names(run)
    for name in sorted(names, key=lambda one: one == latest, reverse=True):
        problem = why_broken(run / FOLDER / name)
        if problem is None:
            return run / FOLDER / name
        warn(f"checkpoint {name} is not whole ({problem}); trying an older one")
    raise CheckpointError(f"{run} holds no whole checkpoint (found: {', '.join(names) or 'none'}); start a new one")


def why_broken(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in entries.items():
            path = folder / name
            if path.resolve().is_relative_to(folder.resolve()) is False:
                return f"{name} lies outside it"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if sha256_of(path) != entry["sha256"]:
                return f"{name} has another SHA-256"
        missing = {WEIGHTS, CONFIG, TOKENIZER, STATE} - set(entries)
        return f"the manifest lacks {', '.join(sorted(missing))}" if missing else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def steps_done(run: Path) -> int:
    """Of the newest checkpoint, whole or not; 0 where there is none."""
    return int(next(iter(_names(run)), "step-0").removeprefix("step-"))


def read_state(folder: Path) -> State:
    return State(**json.loads((folder / STATE).read_text(encoding="utf-8")))


def read_config(folder: Path) -> Config:
    return Config.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))


def read_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / TOKENIZER))


def read_model(folder: Path) -> tuple[Clip, Tokenizer, Config]:
    """The trained model in fp32, its tokenizer and configuration, from safetensors and JSON."""
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    model = Clip(config.model, tokenizer.get_vocab_size())
    model.load_state_dict(load_safetensors((folder / WEIGHTS).read_bytes()))
    return model.eval(), tokenizer, config


def describe_mismatch(state: State, processes: int, zero_stage: int) -> str | None:
    """Why the engine's files of `state` cannot go on here, or None."""
    found: dict[str, Any] = {
        "job.processes": (state.processes, processes),
        "job.zero_stage": (state.zero_stage, zero_stage),
    }
    for name, (then, now) in found.items():
        if then != now:
            return (
                f"the checkpoint was written with {name}={then} and this job has {now}; its optimizer state is cut "
                f"to fit that: resume with {then}, or start a new run"
            )
    return None


def _names(run: Path) -> list[str]:
    """Finished checkpoints, newest first: by number, for a millionth step has a digit more than the others."""
    names = [path.name for path in (run / FOLDER).glob("step-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(names, key=lambda name: int(name.removeprefix("step-")), reverse=True)
