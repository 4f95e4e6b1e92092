"""The steps of a run, most important first, and how long each takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .. import ROOT, Row
from ..gpu_tools.external import SANITIZED
from ..gpu_tools.probe import Sizes
from ..problems import LOSSES, Case
from ..records import table
from ..short_run import run_tests
from . import compilation, graphs, products, rivals, steps
from .goals import COMPILED, COMPILING, GOAL_SIZE, MIB, STANDING_SIZE, estimate, estimate_graph

SIZES = (4096, 16384, 32768, 65536, 131072)
WIDTHS = (512, 768, 1024)
SUITE = ROOT / "tests" / "backends" / "test_triton_gpu.py"


@dataclass(frozen=True)
class Scale:
    """How large the steps are, and where. Those of a GPU; a rehearsal takes smaller ones, without a GPU.

    prepare, environment   ready every worker process
    """

    device: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)  # the first is the one timed
    n: tuple[int, ...] = SIZES
    d: tuple[int, ...] = WIDTHS
    first: tuple[int, int] = GOAL_SIZE  # the size that is timed first
    small: tuple[tuple[int, int], ...] = ((4096, 512), (8192, 512))  # with and without a CUDA graph
    standing: tuple[int, int] = STANDING_SIZE
    # Ragged, of a width that takes the tile shapes that are timed, and of several super-blocks where they are mirrored:
    # every kernel is launched that larger sizes launch. Small enough for the tuner to time nothing.
    smoke: tuple[int, int] = (3900, 512)
    smoke_mib: str = "64"  # SOFTCLIP_GPU_MIB then: super-blocks that are smaller than it
    checked: tuple[int, int] = (1000, 96)
    repeats: int = 250
    memory: tuple[int, int] = (16384, 512)
    million: tuple[int, int] = (1 << 20, 512)
    first_call: tuple[int, int] = (4096, 512)
    seconds: float = 1.0  # of every timing, at least
    minutes: float = 8.5
    patience: float = 1.0  # how much longer than on an H100 a step may take
    gemm: int = 8192  # edge of the matrix products
    probe: Sizes | None = None  # the tool's own where None
    sanitized: tuple[int, int] = SANITIZED
    suite: Path = SUITE
    prepare: Callable[[], object] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def forcing(self, candidate: str) -> Scale:
        """With this tile shape for every worker process, where it is not ""."""
        environment = {**self.environment, compilation.FORCED: candidate} if candidate else self.environment
        return replace(self, environment=environment)


@dataclass(frozen=True)
class Step:
    """A row of the record. `estimate` is of an H100, in seconds, compile time included.

    place    "worker": in a process that lives as long as nothing breaks it; "fresh": in one with empty caches; "here":
             as what starts processes of its own and is told how many seconds they have
    spare    taken if time is left: what the others are estimated at leaves none for it
    """

    kind: str
    case: Case | None
    estimate: float
    function: Callable[..., Row]
    arguments: dict[str, Any] = field(default_factory=dict)
    place: str = "worker"
    spare: bool = False

    def labels(self) -> Row:
        return {"kind": self.kind, **(self.case.labels() if self.case else {})}


def plan(options: argparse.Namespace, scale: Scale) -> Iterator[Step]:
    """Smoke, every candidate compiled, the size of the goals and its phases, CUDA graphs of small batches, tests,
    correctness, the standing row, memory, a million rows, the first call, the other sizes."""

    def case(size: tuple[int, int], loss: str = "hard", dtype: torch.dtype = scale.dtypes[0]) -> Case:
        return Case(loss, dtype, *size, scale.device)

    def speed(size: tuple[int, int], loss: str, kind: str = "speed", spare: bool = False) -> Step:
        compared = steps.RIVALS[loss] if kind == "speed" else (COMPILED,)
        seconds = scale.seconds if size == scale.first else scale.seconds / 2
        arguments = {"rivals": compared, "with_hard": True, "rounds": options.rounds, "seconds": seconds}
        seconds_taken = estimate(case(size, loss), options.rounds, kind == "compiled")
        return Step(kind, case(size, loss), seconds_taken, steps.speed, arguments | {"gemm": scale.gemm}, spare=spare)

    sizes = [(n, d) for d in options.d for n in options.n]
    timed_first = {(scale.first, loss) for loss in LOSSES} | {(scale.standing, "hard")}
    for loss in LOSSES:
        yield Step(
            "smoke", case(scale.smoke, loss), 4 + COMPILING, steps.correctness, {"repeats": 3, "mib": scale.smoke_mib}
        )
    if not options.candidate:
        environment = {**scale.environment, MIB: scale.smoke_mib}
        readied = {"prepare": scale.prepare, "environment": environment}
        smoked = {"cases": [case(scale.smoke, loss) for loss in LOSSES]}
        yield Step("compilation", None, 40, compilation.compile_candidates, readied | smoked, "here")
    if scale.first in sizes:
        yield from (speed(scale.first, loss) for loss in LOSSES)
        for loss in LOSSES:
            yield Step("breakdown", case(scale.first, loss), 6, products.breakdown, {"gemm": scale.gemm})
    for small in (case(size, loss) for size, loss in product(scale.small, graphs.RIVALS)):
        timed = {"rounds": options.rounds, "seconds": scale.seconds / 2}
        yield Step("graph", small, estimate_graph(small), graphs.graph, timed)
    if not options.no_tests:
        yield Step("tests", None, 80, run_tests, {"suite": options.suite}, "here")
    for dtype, loss in product(scale.dtypes, LOSSES):
        size = case(scale.checked, loss, dtype)
        yield Step("correctness", size, 2 + COMPILING, steps.correctness, {"repeats": scale.repeats})
    if scale.standing in sizes:
        yield speed(scale.standing, "hard")
        yield Step("memory", case(scale.standing), 3, steps.memory)
        if options.rivals:
            arguments = {"folder": options.rivals, "rounds": options.rounds}
            yield Step("rivals", case(scale.standing), 40, rivals.compare, arguments)
    if not options.no_compile and scale.first in sizes:
        yield from (speed(scale.first, loss, "compiled") for loss in LOSSES)
    for loss, dtype in product(LOSSES, dict.fromkeys((scale.dtypes[0], torch.float32))):
        compiling = COMPILING if dtype == torch.float32 else 0.0
        yield Step("memory", case(scale.memory, loss, dtype), 2 + compiling, steps.memory)
    yield Step("million", case(scale.million), 15, steps.million)
    yield Step("first call", case(scale.first_call), 40, steps.first_call, place="fresh")
    others = [one for one in product(sizes, LOSSES) if one not in timed_first]
    yield from (speed(size, loss, spare=True) for size, loss in others)


def schedule(planned: Sequence[Step], limit: float) -> str:
    """The steps with their estimates, and the sums beside the limit (seconds)."""
    rows = [step.labels() | {"estimate s": step.estimate} for step in planned if not step.spare]
    spare = [step.estimate for step in planned if step.spare]
    needed = sum(row["estimate s"] for row in rows)
    sums = f"{needed:.0f} s of {limit:.0f} s; if time is left, {len(spare)} more of {sum(spare):.0f} s"
    return f"{table(rows)}\n{sums}"
