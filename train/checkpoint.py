"""Checkpoints that a crash cannot spoil.

A checkpoint is a folder `checkpoints/step-000120`:

    model.safetensors  config.json  state.json    safe to share: no code in them
    ema.safetensors                               likewise: of the teacher `ema`, where there is one, for resuming
    towers/                                       what its kind of towers is built from, such as a tokenizer, likewise
    fingerprint.json                              of the data, the teachers, the code and the versions
    engine/                                       the optimizer's state, a file a rank, for resuming: see engine_state
    manifest.json                                 SHA-256 and size of all others

It is written under another name, flushed to disk, and renamed; `checkpoints/latest` is written last. Whoever reads
checks the manifest, reads the parts, and falls back to the newest checkpoint that is whole, readable and finite. No
part can run code when it is read: see engine_files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from . import heartbeat, towers
from .config import CHANGEABLE, REPLACED, Config, changes
from .files import explain, sha256_of, sync_file, sync_folder, write_atomically, write_new
from .fingerprint import Fingerprint
from .options import SKIP_WINDOW, ConfigError
from .targets import EMA, teachers_of

FOLDER, LATEST, MANIFEST, ENGINE = "checkpoints", "latest", "manifest.json", "engine"
TOWERS = "towers"
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"
CONFIG, STATE, FINGERPRINT = "config.json", "state.json", "fingerprint.json"
NAME = re.compile(r"step-[0-9]{6,}")
SHOWN = 300  # characters of another library's error
MAX_COUNT = 2**62  # of steps and the like


class CheckpointError(RuntimeError):
    """No checkpoint can be used; the message says why and what to do."""


class RunError(RuntimeError):
    """A run ends though its code is right; the message says why, and how to go on."""


@dataclass(frozen=True)
class State:
    """What a run knows besides parameters.

    step              how many steps are done; skipped ones count
    skipped           how many of them were skipped
    processes         by how many processes they were done
    zero_stage        DeepSpeed ZeRO's, 0 to 3
    skipped_in_a_row  how many were skipped since the last step that was not
    recent_skips      the numbers of the skipped ones among the last SKIP_WINDOW steps
    bad               how many records were bad, and replaced, in all batches
    """

    step: int
    skipped: int
    processes: int
    zero_stage: int
    skipped_in_a_row: int = 0
    recent_skips: tuple[int, ...] = ()
    bad: int = 0

    def after(self, applied: bool, bad: int = 0) -> State:
        """The state one step on, whose batch was `applied` or skipped, and had `bad` records replaced."""
        recent = tuple(step for step in self.recent_skips if step > self.step - SKIP_WINDOW)
        return replace(
            self,
            step=self.step + 1,
            skipped=self.skipped + (not applied),
            skipped_in_a_row=0 if applied else self.skipped_in_a_row + 1,
            recent_skips=recent if applied else (*recent, self.step),
            bad=self.bad + bad,
        )


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def begin(run: Path, step: int) -> Path:
    """An empty scratch folder for the checkpoint of `step`, on the same file system; leftovers of a crash go."""
    for left in (run / FOLDER).glob(".*.tmp"):  # one process writes here at a time
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    scratch = _scratch(run, step)
    scratch.mkdir(parents=True)
    return scratch


def abandon(run: Path, step: int) -> None:
    """Remove the scratch folder of a checkpoint that could not be written."""
    shutil.rmtree(_scratch(run, step), ignore_errors=True)


def write_portable(
    folder: Path,
    weights: dict[str, torch.Tensor],
    config: Config,
    files: Mapping[str, bytes],
    state: State,
    fingerprint: Fingerprint,
    ema: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Weights, those of the teacher `ema` where there is one, configuration, the towers' own files, state and
    fingerprint, none of which can run code."""
    for file, tensors in ((WEIGHTS, weights), (EMA_WEIGHTS, ema)):
        if tensors:
            held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
            write_new(folder / file, save_safetensors(held))
    write_new(folder / CONFIG, json.dumps(config.to_dict(), indent=1).encode())
    (folder / TOWERS).mkdir()  # their names may be any, config.json among them
    for name, content in files.items():
        write_new(folder / TOWERS / name, content)
    write_new(folder / STATE, json.dumps(asdict(state)).encode())
    write_new(folder / FINGERPRINT, fingerprint.to_json().encode())


def commit(run: Path, scratch: Path, step: int, keep: int, keep_every: int) -> Path:
    """Make a written scratch folder the latest checkpoint and remove older ones but `keep` of them and those that
    `keep_every` keeps (see spared)."""
    entries = {}
    for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
        entries[path.relative_to(scratch).as_posix()] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        heartbeat.tick()  # many files are no hang
        sync_file(path)
    write_atomically(scratch / MANIFEST, json.dumps(entries, indent=1).encode())
    final = run / FOLDER / name_of(step)
    if final.exists():  # a damaged one that a resumed run passes again
        shutil.rmtree(final)
    scratch.rename(final)
    sync_folder(final.parent)
    write_atomically(run / FOLDER / LATEST, f"{final.name}\n".encode())
    # Newer ones were passed over when the run was resumed, and are replaced as it passes them: they are no good ones.
    older = [name for name in _names(run) if _step(name) <= step]
    for old in older[keep:]:
        if _step(old) not in spared([_step(name) for name in older], keep_every):
            shutil.rmtree(run / FOLDER / old, ignore_errors=True)
    return final


def spared(steps: list[int], keep_every: int) -> set[int]:
    """Those of `steps` that are never removed: the first at or after each multiple of `keep_every`, which need not be
    one of the steps between checkpoints. 0: none."""
    first: dict[int, int] = {}
    for step in sorted(steps):
        if keep_every and step >= keep_every:
            first.setdefault(step // keep_every, step)
    return set(first.values())


def find(run: Path, warn: Callable[[str], None] = print, engine: bool = False) -> Path:
    """The newest good checkpoint: `latest`, or, with a warning for each that is not good, the newest of the others.
    `engine`: one that training can go on from, moments included. Raises CheckpointError where there is none."""
    try:
        latest = (run / FOLDER / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        latest = ""
    names = _names(run)
    for name in sorted(names, key=lambda name: name == latest, reverse=True):
        problem = why_broken(run / FOLDER / name, engine)
        if problem is None:
            return run / FOLDER / name
        warn(f"checkpoint {name} {problem}; trying an older one")
    raise CheckpointError(f"{run} holds no whole checkpoint (found: {', '.join(names) or 'none'}); start a new one")


def of_step(run: Path, step: int) -> Path:
    """The checkpoint of `step`. Raises CheckpointError where it is missing or not good."""
    if name_of(step) not in _names(run):
        raise CheckpointError(f"{run} holds no checkpoint {name_of(step)} (found: {', '.join(_names(run)) or 'none'})")
    problem = why_broken(run / FOLDER / name_of(step))
    if problem is not None:
        raise CheckpointError(f"checkpoint {name_of(step)} {problem}; choose another of {', '.join(_names(run))}")
    return run / FOLDER / name_of(step)


def why_broken(folder: Path, engine: bool = False) -> str | None:
    """What is wrong with a checkpoint, and where it is asked for with its `engine` files, or None."""
    problem = _why_not_whole(folder)
    if problem is not None:
        return f"is not whole ({problem})"
    try:
        weights = read_bundle(folder).module.state_dict()
        if engine and EMA in teachers_of(read_config(folder).loss):
            weights |= {f"{name} ({EMA})": tensor for name, tensor in read_ema(folder).items()}
        bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if bad:
            return f"is not finite (NaN or infinity in {name_some(bad)})"
        state = read_state(folder)
        read_fingerprint(folder)
        if engine:
            from .engine_files import why_unusable  # DeepSpeed takes seconds to import

            problem = why_unusable(folder / ENGINE, state.processes)
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # the readers of other libraries raise what they like, and a bare Exception
        problem = _short(error)
    return None if problem is None else f"cannot be used ({problem})"


def _why_not_whole(folder: Path) -> str | None:
    """Which file of the manifest is not as it was written, or None."""
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
        missing = {WEIGHTS, CONFIG, STATE} - set(entries)
        return f"the manifest lacks {', '.join(sorted(missing))}" if missing else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _short(error)


def steps_done(run: Path) -> int:
    """The steps of the newest checkpoint, whole or not; 0 where there is none."""
    return _step(next(iter(_names(run)), name_of(0)))


def read_state(folder: Path) -> State:
    """Fields that an earlier version did not know have their defaults. Raises CheckpointError where a field is unknown,
    missing, or no count."""
    content = _read_mapping(folder / STATE)
    required = {field.name: field.default is MISSING for field in fields(State)}
    unknown = sorted(content.keys() - required.keys())
    missing = sorted(name for name in required if required[name] and name not in content)
    if unknown:
        raise CheckpointError(
            f"{STATE} holds {', '.join(unknown)}, which this version does not know: a newer one wrote it"
        )
    if missing:
        raise CheckpointError(f"{STATE} lacks {', '.join(missing)}")
    recent = content.pop("recent_skips", [])
    if not isinstance(recent, list):
        raise CheckpointError(f"{STATE} gives recent_skips as {recent!r}, and a list is allowed")
    for name, value in (*content.items(), *(("recent_skips", step) for step in recent)):
        if type(value) is not int or not 0 <= value < MAX_COUNT:
            raise CheckpointError(f"{STATE} gives {name} as {value!r}, and a whole number from 0 to 2^62 is allowed")
    return State(**content, recent_skips=tuple(recent))


def read_config(folder: Path) -> Config:
    """Options of earlier versions that others replaced are left out, for they never were a part of what is trained, but
    for data.corrupt. Raises CheckpointError where it is not a configuration of this version."""
    content = _read_mapping(folder / CONFIG)
    data = content.get("data")
    if isinstance(data, dict) and data.get("corrupt"):
        data["noise"] = {"swap": data["corrupt"]}
    for name in REPLACED:
        section, _, option = name.partition(".")
        if isinstance(content.get(section), dict):
            content[section].pop(option, None)
    try:
        return Config.from_dict(content)
    except ConfigError as error:
        raise CheckpointError(f"{CONFIG}: {error}") from error


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """None where an earlier version wrote the checkpoint."""
    path = folder / FINGERPRINT
    try:
        return Fingerprint.from_json(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{FINGERPRINT}: {_short(error)}") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: {_short(error)}") from error
    if not isinstance(mapping, dict):
        raise CheckpointError(f"{path.name} holds {type(mapping).__name__}; a mapping is needed")
    return mapping


def read_files(folder: Path) -> dict[str, bytes]:
    """The towers' own files. Earlier versions, which had one kind of towers, kept its tokenizer beside the weights."""
    paths = list((folder / TOWERS).iterdir()) if (folder / TOWERS).is_dir() else [folder / "tokenizer.json"]
    return {path.name: path.read_bytes() for path in sorted(paths) if path.is_file()}


def read_bundle(folder: Path, compiled: bool = True) -> towers.Bundle:
    """The trained towers in fp32, on the CPU, for evaluation: from safetensors and JSON. `compiled`: where the run's
    are, which takes minutes and pays for many pictures."""
    model = read_config(folder).model
    bundle = towers.build(replace(model, compile=model.compile and compiled), tuple, files=read_files(folder))
    bundle.module.load_state_dict(load_safetensors((folder / WEIGHTS).read_bytes()))
    bundle.module.eval()
    return bundle


def read_ema(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the teacher `ema`, on the CPU. Raises CheckpointError where there are none."""
    path = folder / EMA_WEIGHTS
    if not path.exists():
        raise CheckpointError(f"{folder.name} lacks {EMA_WEIGHTS}, without which the teacher 'ema' cannot go on")
    return load_safetensors(path.read_bytes())


def other_options(then: Config, now: Config) -> tuple[list[str], list[str]]:
    """The options that differ, in words: those that no run may go on with, and those that it may. How many processes
    were asked for is not one: what counts is the number that started."""
    differ = {name: pair for name, pair in changes(then, now).items() if name != "job.processes"}
    words = {name: f"{name}={before!r} then, {after!r} now" for name, (before, after) in differ.items()}
    return [words[name] for name in words if name not in CHANGEABLE], [
        words[name] for name in words if name in CHANGEABLE
    ]


def name_some(names: list[str]) -> str:
    """The first few, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")


def _short(error: Exception) -> str:
    if isinstance(error, OSError):
        return explain(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:SHOWN]}{'…' if len(text) > SHOWN else ''}"


def _scratch(run: Path, step: int) -> Path:
    return run / FOLDER / f".{name_of(step)}.tmp"


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _names(run: Path) -> list[str]:
    """Finished checkpoints, newest first: by number, for a millionth step has a digit more than the others. Raises
    CheckpointError where there is a folder of them that cannot be read: as if there were none, the run would be taken
    for a new one."""
    try:
        with os.scandir(run / FOLDER) as entries:
            names = [entry.name for entry in entries if NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"the checkpoints cannot be read: {explain(error)}") from error
    return sorted(names, key=_step, reverse=True)


def has_any(run: Path) -> bool:
    """Whether the run ever finished a checkpoint, good or not."""
    return bool(_names(run))
