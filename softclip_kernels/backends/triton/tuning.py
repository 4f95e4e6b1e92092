"""Which of the candidate tile shapes a GPU runs: timed once, remembered in this process and in a file.

The file, tiles.json under $XDG_CACHE_HOME/softclip_kernels or ~/.cache/softclip_kernels, is a convenience: one that is
missing, unreadable or of another format is as good as none, and deleting it is safe. Two processes that write at once
both leave a whole file, the later one's. SOFTCLIP_AUTOTUNE=0 takes the first candidate and touches no file.
SOFTCLIP_CANDIDATE names the candidate to take, on any device and for problems of any size: "128x256x64w8s3" for every
kind of kernel that has one of this name, or "forward=128x256x64w8s3,backward=128x128x64w8s3"; "sm90" is the CUDA C++
kernels'.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import TritonError

from .. import cache_folder
from ..cuda.driver import DriverError
from . import call
from .shapes import ARCHITECTURES, SM90, TIMED, Shape, every_name

logger = logging.getLogger("softclip_kernels")

FORMAT = 4  # raised with every change of what a key or a shape means: older files are replaced
WORTHWHILE = 4096**2  # entries of a problem; below, no choice is worth the wait for a measurement
LAUNCHES, ROUNDS = 4, 3
CANDIDATE = "SOFTCLIP_CANDIDATE"

Launch = Callable[[], object]
Trial = Callable[[Shape], tuple[Launch, int]]
Case = Callable[[], str]  # asked only where something is timed


class SelfTestError(RuntimeError):
    """A candidate's result, on the operands that it was to be timed with, differs from the first candidate's."""


_chosen: dict[str, Shape] = {}
_measurements: dict[str, dict[str, Any]] = {}


def choose(kind: str, case: Case, shapes: Sequence[Shape], trial: Trial, entries: int, device: torch.device) -> Shape:
    """The shape of a kind of kernel (forward, backward, ...) for problems of this case, of `entries` entries. `trial`
    makes a launch of a shape, to be timed, and says how many entries it covers. Small problems and unknown cases under
    CUDA graph capture take the first shape."""
    forced = _forced(kind, shapes)
    if forced is not None:
        return forced
    if len(shapes) == 1 or device.type != "cuda" or not times(entries):
        return shapes[0]
    key = f"{kind} {case()} of {' '.join(shape.name for shape in shapes)}"
    if _chosen.get(key) not in shapes:
        recorded = _from_file(key, shapes)
        if recorded is not None:
            _remember(key, recorded, f"as recorded in {path()}")
        elif torch.cuda.is_current_stream_capturing():
            return shapes[0]
        else:
            _remember(key, *_fastest(key, shapes, trial))
            _to_file(key, _chosen[key])
    return _chosen[key]


def times(entries: int) -> bool:
    """Whether candidates are timed for a problem of so many entries."""
    return entries >= WORTHWHILE and os.environ.get("SOFTCLIP_AUTOTUNE", "1") != "0"


def measurements() -> dict[str, dict[str, Any]]:
    """What this process timed, ready for JSON, by key (kind, GPU, versions, problem, candidates): the name that was
    "chosen", for every name its "ps an entry", and for those that could not be timed, "left out", the reason."""
    return copy.deepcopy(_measurements)


def path() -> Path:
    return cache_folder.folder() / "tiles.json"


def measure(launch: Launch) -> float:
    """Seconds a launch, the shortest of a few rounds. Waits for the GPU."""
    launch()  # compiles
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / LAUNCHES)
    return min(times)


def _forced(kind: str, shapes: Sequence[Shape]) -> Shape | None:
    """The candidate that SOFTCLIP_CANDIDATE asks for. One that is named for this very kind must be there, a bare name
    for some kind."""
    wanted = os.environ.get(CANDIDATE, "")
    if not wanted:
        return None
    named = {name: shape for shape in shapes for name in (shape.name, *([SM90] if shape.way == SM90 else []))}
    if "=" not in wanted:
        if wanted not in named and not any(wanted in every_name(architecture) for architecture in ARCHITECTURES):
            raise ValueError(f"SOFTCLIP_CANDIDATE={wanted}: no such candidate; of {kind} there are {', '.join(named)}")
        return named.get(wanted)
    names = dict(part.strip().partition("=")[::2] for part in wanted.split(","))
    for other in names.keys() - set(TIMED):
        raise ValueError(f"SOFTCLIP_CANDIDATE={wanted}: no kind {other!r}; there are {', '.join(TIMED)}")
    name = names.get(kind)
    if name is not None and name not in named:
        suitable = ", ".join(named)
        raise ValueError(f"SOFTCLIP_CANDIDATE={wanted}: {name!r} does not suit this problem's {kind}, but {suitable}")
    return None if name is None else named[name]


def _fastest(key: str, shapes: Sequence[Shape], trial: Trial) -> tuple[Shape, str]:
    """A shape and why. Shapes that do not compile or do not fit this GPU are left out."""
    if call.recorder is not None:
        call.recorder.interrupt()
    times: dict[Shape, float] = {}
    left_out: dict[str, str] = {}
    for shape in shapes:
        try:
            launch, entries = trial(shape)
            times[shape] = measure(launch) / entries
        except (TritonError, RuntimeError) as error:
            if not is_the_shapes_own(error):
                raise
            left_out[shape.name] = str(error).split("\n")[0]
            logger.info("triton backend: tile %s is left out (%s)", shape.name, left_out[shape.name])
            torch.cuda.synchronize()  # raises if the kernel left the device unusable, as by an illegal access
    best = min(times, key=times.__getitem__) if times else shapes[0]
    measured = {shape.name: 1e12 * seconds for shape, seconds in times.items()}
    _measurements[key] = {"chosen": best.name, "ps an entry": measured, "left out": left_out}
    if not times:
        return best, "because no candidate could be timed"
    return best, f"measured in ps an entry: {', '.join(f'{name} {time:.3g}' for name, time in measured.items())}"


def is_the_shapes_own(error: Exception) -> bool:
    """Whether a candidate failed to compile or to launch, or is wrong: by Triton's errors, what its driver and its
    compiler say in RuntimeErrors, or torch's error of the device, which torch 2.8 made a class of its own."""
    own = (TritonError, DriverError, SelfTestError, getattr(torch, "AcceleratorError", TritonError))
    return isinstance(error, own) or str(error).startswith(("Triton Error [", "PassManager::run failed"))


def _remember(key: str, shape: Shape, reason: str) -> None:
    _chosen[key] = shape
    logger.info("triton backend: tile %s for %s, %s", shape.name, key, reason)


def _from_file(key: str, shapes: Sequence[Shape]) -> Shape | None:
    recorded = _read().get(key)
    if recorded is None:
        return None
    for shape in shapes:
        if shape.name == recorded:
            return shape
    logger.info("triton backend: %s in %s is no candidate and is ignored", recorded, path())
    return None


def _read() -> dict[str, Any]:
    try:
        content = json.loads(path().read_text())
        if content["format"] != FORMAT or not isinstance(content["tiles"], dict):
            raise ValueError(f"format {content['format']}")
        return content["tiles"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.info("triton backend: %s is ignored (%s: %s)", path(), type(error).__name__, error)
        return {}


def _to_file(key: str, shape: Shape) -> None:
    content = {"format": FORMAT, "tiles": _read() | {key: shape.name}}
    try:
        cache_folder.write_whole(path(), json.dumps(content, indent=1).encode())
    except OSError as error:
        logger.info("triton backend: %s is not written (%s)", path(), error)
