"""Small batches, where users start, and where what a pass costs the host weighs most: with and without a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softclip_kernels.testing import Result

from .. import Row, timing
from ..problems import BUILT_IN, Case
from .goals import EAGER
from .steps import add_rivals, check

RIVALS = {"hard": (EAGER, BUILT_IN), "psd": (EAGER,)}
Pass = Callable[[], Result]


def graph(case: Case, rounds: int, seconds: float) -> Row:
    """The fused loss with and without a graph beside its rivals, after both were found to be right. "over": how many
    times as long a rival takes as the fused loss; "graph over": as the graph."""
    leaves = case.operands()
    x, y, scale = (leaf.detach() for leaf in leaves)
    fused = case.fused("triton")
    row: Row = {"checked against": check(case, fused, x, y, scale)}

    def run() -> Result:
        return Result.of(fused, x, y, scale)

    row["outcome"], replay = captured(run, case.device)
    check_replay(replay, run, x, y, scale)
    contenders: dict[str, Callable[[], object]] = {"fused": run, "graph": replay}
    row |= add_rivals(contenders, RIVALS[case.loss], case, leaves)
    timings = timing.interleaved(contenders, rounds, 1, seconds, timing.device_seconds)
    for rival, timed in timings.items():
        if rival != "graph":
            row[f"graph over {rival}"] = timed.median / timings["graph"].median
        if rival in RIVALS[case.loss]:
            row[f"over {rival}"] = timed.median / timings["fused"].median
    return row | timings


def captured(run: Pass, device: str) -> tuple[str, Pass]:
    """What it is, and what replays it: a graph of one pass, captured after a warm-up."""
    if torch.device(device).type != "cuda":
        return f"no CUDA graph on a {device}, a pass stands in for it", run
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Result:
        graph.replay()
        return result

    return "replayed as a CUDA graph", replay


def check_replay(replay: Pass, run: Pass, x: Tensor, y: Tensor, scale: Tensor) -> None:
    """Bit for bit a pass's result, of other operands than it was captured with. Raises AssertionError."""
    for operand, other in ((x, x.roll(1, 0)), (y, y.roll(1, 0)), (scale, scale / 2)):
        operand.copy_(other)
    if differing := run().differing(replay()):
        raise AssertionError(f"{', '.join(differing)} of a replayed graph differ from those of a pass")
