"""Every candidate tile shape compiled and checked over several processes, so that what comes later finds it in Triton's
cache: one process would take minutes to compile what the tuner then times in seconds. Those that fail are kept from
the tuner."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any
from unittest import mock

import torch

from softclip_kernels.testing import FIELDS, Result

from .. import Row
from ..problems import Case
from ..short_run import Failed, Worker
from .steps import check_close

FORCED, SM90 = "SOFTCLIP_CANDIDATE", "sm90"


def compile_candidates(
    cases: Sequence[Case],
    prepare: Callable[[], object] | None,
    environment: Mapping[str, str],
    seconds: float,
) -> Row:
    """After `seconds` at most. A candidate that does not compile is left out by the tuner and no failure. One that is
    wrong, hangs or breaks its process is one, and so is one that there was no time for: the tuner may take it."""
    start = time.monotonic()
    workers: SimpleQueue[Worker] = SimpleQueue()
    every = [Worker(prepare, environment) for _ in range(max(1, (os.cpu_count() or 2) - 2))]
    for worker in every:
        workers.put(worker)

    def outcome(task: tuple[Case, str]) -> tuple[str, str]:
        """A key of the row, and why."""
        worker = workers.get()
        try:
            left = start + seconds - time.monotonic()
            if left <= 0:
                return "failed", "no time left"
            why_left_out = worker.call(run_candidate, {"case": task[0], "forced": task[1]}, left)
            return "left out", why_left_out
        except Failed as failure:
            return "failed", str(failure)
        finally:
            workers.put(worker)

    try:
        tasks = [(case, forced) for case in cases for forced in every[0].call(candidates_of, {"case": case}, seconds)]
        with ThreadPoolExecutor(len(every)) as pool:
            outcomes = list(pool.map(outcome, tasks))
    finally:
        for worker in every:
            worker.end()
    found: dict[str, dict[str, str]] = {"left out": {}, "failed": {}}
    for (case, forced), (key, why) in zip(tasks, outcomes, strict=True):
        if why:
            found[key][f"{case.loss} {forced}"] = why
    suspects = {forced for (_, forced), (key, _) in zip(tasks, outcomes, strict=True) if key == "failed"}
    told = [f"{len(which)} {key} ({', '.join(which)})" for key, which in found.items() if which]
    return {
        "passed": not found["failed"],
        "outcome": ", ".join([f"{len(tasks)} candidates", *told]),
        **found,
        "kept from the tuner": sorted(suspects),
        "processes": len(every),
    }


def candidates_of(case: Case) -> list[str]:
    """What SOFTCLIP_CANDIDATE may be for this case: "kind=name" for every choice that a pass leaves to the tuner."""
    with mock.patch.dict(os.environ, {FORCED: SM90}):  # offered to small problems only where they are asked for
        found = choices(lambda: Result.of(case.fused("triton"), *(leaf.detach() for leaf in case.operands())))
    return [f"{kind}={name}" for kind, names in found.items() for name in names]


def choices(run: Callable[[], object]) -> dict[str, tuple[str, ...]]:
    """By kind of kernel, the names of the candidates that `run` leaves to the tuner, which takes the first."""
    from softclip_kernels.backends.triton import tuning

    found: dict[str, tuple[str, ...]] = {}

    def choose(kind: str, case_of: tuning.Case, shapes: Sequence[tuning.Shape], *_: object) -> tuning.Shape:
        found[kind] = tuple(dict.fromkeys((*found.get(kind, ()), *(shape.name for shape in shapes))))
        return shapes[0]

    with mock.patch.object(tuning, "choose", choose):
        run()
    return found


def keep_from_tuner(failed: Collection[str], prepare: Callable[[], object] | None) -> None:
    """Readies a process (`prepare`) whose tuner leaves these candidates ("kind=name") out: one that hangs would end all
    steps that time it."""
    from softclip_kernels.backends.triton import tuning

    if prepare is not None:
        prepare()
    choose = tuning.choose

    def choose_of_others(kind: str, case_of: tuning.Case, shapes: Sequence[tuning.Shape], *others: Any) -> tuning.Shape:
        whole = [shape for shape in shapes if f"{kind}={shape.name}" not in failed]
        return choose(kind, case_of, whole or shapes, *others)

    mock.patch.object(tuning, "choose", choose_of_others).start()


def run_candidate(case: Case, forced: str) -> str:
    """Forward and backward with this candidate, against the dense loss in float32: "", or why the tuner would leave it
    out. Raises AssertionError where it is wrong."""
    from softclip_kernels.backends.triton import tuning

    x, y, scale = (leaf.detach() for leaf in case.operands())
    with mock.patch.dict(os.environ, {FORCED: forced}):
        try:
            got = Result.of(case.fused("triton"), x, y, scale)
        except Exception as error:
            if not tuning.is_the_shapes_own(error):
                raise
            torch.cuda.synchronize()  # raises where the device is left unusable
            return str(error).split("\n")[0]
    expected = Result.of(case.in_float32(), x.float(), y.float(), scale)
    for field in FIELDS:
        check_close(f"{forced}: {field}", getattr(got, field), getattr(expected, field))
    return ""
