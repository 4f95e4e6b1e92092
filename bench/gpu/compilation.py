"""Every candidate tile shape compiled and checked over several processes, so that what comes later finds it in Triton's
cache: one process would take minutes to compile what the tuner then times in seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from unittest import mock

from softclip_kernels.testing import FIELDS, Result

from .. import Row
from ..problems import Case
from ..short_run import Failed, Worker
from .steps import check_close

FORCED = "SOFTCLIP_CANDIDATE"


def compile_candidates(
    cases: Sequence[Case],
    prepare: Callable[[], object] | None,
    environment: Mapping[str, str],
    seconds: float,
) -> Row:
    """After `seconds` at most. A candidate that does not compile is left out by the tuner and no failure; one that
    computes something else is."""
    start = time.monotonic()
    workers: SimpleQueue[Worker] = SimpleQueue()
    every = [Worker(prepare, environment) for _ in range(max(1, (os.cpu_count() or 2) - 2))]
    for worker in every:
        workers.put(worker)

    def call(task: tuple[Case, str]) -> str:
        worker = workers.get()
        try:
            left = max(0.0, start + seconds - time.monotonic())
            worker.call(run_candidate, {"case": task[0], "forced": task[1]}, left)
        except Failed as failure:
            return f"wrong: {failure}" if failure.assertion else str(failure)
        finally:
            workers.put(worker)
        return ""

    try:
        tasks = [(case, forced) for case in cases for forced in every[0].call(candidates_of, {"case": case}, seconds)]
        with ThreadPoolExecutor(len(every)) as pool:
            outcomes = dict(zip(((case.loss, forced) for case, forced in tasks), pool.map(call, tasks), strict=True))
    finally:
        for worker in every:
            worker.end()
    left_out = {f"{loss} {forced}": why for (loss, forced), why in outcomes.items() if why}
    wrong = any(why.startswith("wrong") for why in left_out.values())
    return {
        "passed": not wrong,
        "outcome": f"{len(tasks)} candidates, {len(left_out)} left out",
        "left out": left_out,
        "processes": len(every),
    }


def candidates_of(case: Case) -> list[str]:
    """What SOFTCLIP_CANDIDATE may be for this case: "kind=name" for every choice that a pass leaves to the tuner."""
    found = choices(lambda: Result.of(case.fused("triton"), *(leaf.detach() for leaf in case.operands())))
    return [f"{kind}={name}" for kind, names in found.items() for name in names]


def choices(run: Callable[[], object]) -> dict[str, tuple[str, ...]]:
    """By kind of kernel, the names of the candidates that `run` leaves to the tuner, which takes the first."""
    from softclip_kernels.backends.triton import tuning

    found: dict[str, tuple[str, ...]] = {}

    def choose(kind: str, key: str, shapes: Sequence[tuning.Shape], *_: object) -> tuning.Shape:
        found[kind] = tuple(dict.fromkeys((*found.get(kind, ()), *(shape.name for shape in shapes))))
        return shapes[0]

    with mock.patch.object(tuning, "choose", choose):
        run()
    return found


def run_candidate(case: Case, forced: str) -> None:
    """Forward and backward with this candidate, against the dense loss in float32. Raises AssertionError."""
    x, y, scale = (leaf.detach() for leaf in case.operands())
    with mock.patch.dict(os.environ, {FORCED: forced}):
        got = Result.of(case.fused("triton"), x, y, scale)
    expected = Result.of(case.in_float32(), x.float(), y.float(), scale)
    for field in FIELDS:
        check_close(f"{forced}: {field}", getattr(got, field), getattr(expected, field))
