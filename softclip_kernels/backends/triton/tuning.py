"""Which of the candidate tile shapes a GPU runs: timed once, remembered in this process and in a file.

The file, tiles.json under $XDG_CACHE_HOME/softclip_kernels or ~/.cache/softclip_kernels, is a convenience: one that is
missing, unreadable or of another format is as good as none, and deleting it is safe. Two processes that write at once
both leave a whole file, the later one's. SOFTCLIP_AUTOTUNE=0 takes the first candidate and touches no file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import TritonError

from .shapes import Shape

logger = logging.getLogger("softclip_kernels")

FORMAT = 3  # raised with every change of what a key or a shape means: older files are replaced
WORTHWHILE = 4096**2  # entries of a problem; below, no choice is worth the wait for a measurement
LAUNCHES, ROUNDS = 4, 3

Launch = Callable[[], object]
Trial = Callable[[Shape], tuple[Launch, int]]

_chosen: dict[str, Shape] = {}


def choose(key: str, shapes: Sequence[Shape], trial: Trial, entries: int, device: torch.device) -> Shape:
    """The shape for problems of this key, of `entries` entries. `trial` makes a launch of a shape, to be timed, and
    says how many entries it covers. Small problems and unknown keys under CUDA graph capture take the first shape."""
    if len(shapes) == 1 or device.type != "cuda" or entries < WORTHWHILE:
        return shapes[0]
    if os.environ.get("SOFTCLIP_AUTOTUNE", "1") == "0":
        return shapes[0]
    if _chosen.get(key) not in shapes:
        recorded = _from_file(key, shapes)
        if recorded is not None:
            _remember(key, recorded, f"as recorded in {path()}")
        elif torch.cuda.is_current_stream_capturing():
            return shapes[0]
        else:
            _remember(key, *_fastest(shapes, trial))
            _to_file(key, _chosen[key])
    return _chosen[key]


def path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "softclip_kernels" / "tiles.json"


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


def _fastest(shapes: Sequence[Shape], trial: Trial) -> tuple[Shape, str]:
    """A shape and why. Shapes that do not compile or do not fit this GPU are left out."""
    times: dict[Shape, float] = {}
    for shape in shapes:
        try:
            launch, entries = trial(shape)
            times[shape] = measure(launch) / entries
        except TritonError as error:
            logger.info("triton backend: tile %s is left out (%s)", shape.name, str(error).split("\n")[0])
    if not times:
        return shapes[0], "because no candidate could be timed"
    best = min(times, key=times.__getitem__)
    measured = ", ".join(f"{shape.name} {1e12 * seconds:.3g}" for shape, seconds in times.items())
    return best, f"measured in ps an entry: {measured}"


def _remember(key: str, shape: Shape, reason: str) -> None:
    _chosen[key] = shape
    logger.info("triton backend: tile %s for %s, %s", shape.name, key, reason)


def _from_file(key: str, shapes: Sequence[Shape]) -> Shape | None:
    recorded = _read().get(key)
    if recorded is None:
        return None
    for shape in shapes:
        if list(astuple(shape)) == recorded:
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
    content = {"format": FORMAT, "tiles": _read() | {key: list(astuple(shape))}}
    name = None
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path().parent, suffix=".tmp", delete=False) as file:
            name = file.name
            json.dump(content, file, indent=1)
        os.replace(name, path())
    except OSError as error:
        logger.info("triton backend: %s is not written (%s)", path(), error)
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
