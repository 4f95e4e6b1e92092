"""Every kernel that a case takes, with every candidate tile shape, on the super-block that the tuner times."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from unittest import mock

import torch

from softclip_kernels.testing import Result

from .. import Row, timing
from ..problems import FORWARD_PRODUCTS, Case

if TYPE_CHECKING:  # triton may be missing where this module is imported
    from softclip_kernels.backends.triton import tuning
    from softclip_kernels.backends.triton.shapes import Shape

TIMES = 4  # launches in a measurement


def kernels(case: Case, gemm: int = 8192, seconds: float = 1.0) -> list[Row]:
    """A row for every candidate of every kernel whose tile shape the library chooses: ps an entry, TFLOP/s, and the
    share of the rate of (gemm, gemm) matrices. A kernel's candidates and the matrices run in turns, for so many seconds
    at least, on the library's own trials. A candidate that fails is a row with its error, and so is what ends the pass:
    rows until then stay."""
    from softclip_kernels.backends.triton import shapes, tuning

    rows: list[Row] = []
    seen: set[tuple[str, str]] = set()
    a, b, out = (torch.randn(gemm, gemm, device=case.device).to(case.dtype) for _ in range(3))

    def choose(kind: str, case_of: tuning.Case, shapes: Sequence[Shape], trial: tuning.Trial, *_: object) -> Shape:
        problem = case_of()
        if (kind, problem) not in seen:
            seen.add((kind, problem))
            measured = _measured(shapes, trial, lambda: torch.mm(a, b, out=out), seconds)
            rows.extend(
                {"kind": "kernels", **case.labels(), "kernel": kind, "problem": problem, **row} for row in measured
            )
        return shapes[0]

    # The CUDA kernels are offered to small problems only where they are asked for.
    with mock.patch.object(tuning, "choose", choose), mock.patch.dict(os.environ, {tuning.CANDIDATE: shapes.SM90}):
        try:
            Result.of(case.fused("triton"), *(leaf.detach() for leaf in case.operands()))
        except Exception as error:  # as after a candidate that left the device unusable
            rows.append({"kind": "kernels", **case.labels(), **_failure(error)})
    for row in rows:
        row |= _rates(case, row, 2 * gemm**3)
    return rows


def _measured(shapes: Sequence[Shape], trial: tuning.Trial, product: Callable[[], object], seconds: float) -> list[Row]:
    contenders: dict[str, Callable[[], object]] = {"gemm": product}
    entries: dict[str, int] = {}
    failures: dict[str, Row] = {}
    for name, shape in {shape.name: shape for shape in shapes}.items():
        try:
            contenders[name], entries[name] = trial(shape)
            contenders[name]()
            torch.cuda.synchronize()
        except Exception as error:  # of one candidate; the others may still be timed
            contenders.pop(name, None)
            failures[name] = _failure(error)
    often = {name: _often(run) for name, run in contenders.items()}
    timings = timing.interleaved(often, seconds=seconds, measure=timing.device_seconds)
    gemm = timings.pop("gemm").median / TIMES
    return [
        {"candidate": name, "ps an entry": 1e12 * one.median / TIMES / entries[name], "s": one, "gemm s": gemm}
        for name, one in timings.items()
    ] + [{"candidate": name, **failure} for name, failure in failures.items()]


def _failure(error: Exception) -> Row:
    return {"passed": False, "error": f"{type(error).__name__}: {error}".split("\n")[0]}


def _often(run: Callable[[], object]) -> Callable[[], object]:
    return lambda: [run() for _ in range(TIMES)]


def _rates(case: Case, row: Row, gemm_operations: int) -> Row:
    """For the kernels of which it is known how many operations an entry takes."""
    # Of G's products the tuner times both, for a super-block that is its own mirror.
    known = {"forward": FORWARD_PRODUCTS[case.loss], "backward": FORWARD_PRODUCTS[case.loss], "products": 4}
    if "error" in row or row["kernel"] not in known:
        return {}
    rate = known[row["kernel"]] * case.d / row["ps an entry"]  # operations a ps: TFLOP/s
    return {"TFLOP/s": rate, "share of gemm": rate / (gemm_operations / row["gemm s"] / 1e12)}
