"""The table of small batches: forward and backward, from N = 32 on, where a call's fixed costs are most of its time.

cpu                   this library's kernels
dense                 stored matrices in the operands' dtype
dense in float32      the same in float32 arithmetic of bfloat16 operands, gradients in bfloat16 again; for float32
                      operands it is `dense`
linear_cross_entropy  torch's own loss without a matrix of logits, in both directions (hard)

A row is one contender at one size. Beside its time stand its errors against float64, relative to the largest exact
entry: a dense loss in bfloat16 rounds its logits, and is not held to the library's standard. Contenders are checked
first and then timed in turns. A call of more than SLOW seconds is timed in SLOW_ROUNDS rounds, and one of more than
--limit seconds not at all: its row says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from softclip_kernels.testing import Result, truth

from .. import Row, problems
from ..outcomes import EXCEEDED, MEASURED, hopeless
from ..problems import BUILT_IN, Case, Loss
from ..timing import forward_backward, host_seconds, interleaved, repeated

F32, BF16 = DTYPES = torch.float32, torch.bfloat16
LOSSES = ("hard", "psd")
SIZES = (32, 128, 256, 512, 1024, 2048)
CPU, DENSE, DENSE_IN_FLOAT32 = "cpu", "dense", "dense in float32"
# What the project asks for from these N on, as multiples of dense in float32: of both losses and dtypes.
GOALS = {32: 0.7, 128: 1.0, 1024: 1.3}
SHORTEST = 0.02  # seconds of a measurement, at least: a short call is made several times
SLOW, SLOW_ROUNDS = 1.0, 3  # seconds of a call from which it is timed in so many rounds
SETTLED = 0.1  # seconds of a call from which its time grows as N²: below, fixed costs may be most of it
STANDARD_UP_TO = 4096  # N up to which the dense loss in float64 fits (1.6 GiB); above, the chunked backend's stands in
# Of a contender that rounds its logits to bfloat16, the largest error of any field: 2 % was seen (N = 16 to 256).
ROUNDED = 0.1


@dataclass(frozen=True)
class Contender:
    """name; its loss; whether it rounds its logits to bfloat16; None, or why there is no such loss here."""

    name: str
    loss: Loss
    rounding: bool = False
    why_not: str | None = None


def contenders(case: Case) -> list[Contender]:
    rounding = case.dtype == BF16
    found = [Contender(CPU, case.fused("cpu")), Contender(DENSE, case.dense(), rounding)]
    if rounding:
        in_float32 = case.in_float32()
        found.append(Contender(DENSE_IN_FLOAT32, lambda x, y, scale: in_float32(x.float(), y.float(), scale)))
    if case.loss == "hard":
        built_in = partial(problems.built_in, pieces=problems.fewest_pieces(case.n, case.d))
        found.append(Contender(BUILT_IN, built_in, rounding, problems.why_no_built_in()))
    return found


def small_batches(sizes: Sequence[int], d: int, rounds: int, limit: float) -> list[Row]:
    """Every loss, dtype and size. Raises AssertionError where a contender is wrong."""
    rows: list[Row] = []
    for loss, dtype in product(LOSSES, DTYPES):
        problems.check(loss, d, dtype, backend="cpu")
        before: dict[str, Row] = {}
        for n in sorted(sizes):
            found = measure(Case(loss, dtype, n, d), rounds, limit, before)
            before = {row["contender"]: row for row in found}
            rows += found
    return rows


@dataclass(frozen=True)
class First:
    """A contender's first call: what became of it, and where it was made its seconds and its result."""

    contender: Contender
    outcome: str
    seconds: float = 0.0
    result: Result | None = None

    @staticmethod
    def of(one: Contender, leaves: Sequence[Tensor], limit: float, before: Row | None) -> First:
        n = len(leaves[0])
        if why_not := one.why_not or _hopeless(before, n, limit):
            return First(one, why_not)
        start = time.perf_counter()
        result = Result.of(one.loss, *leaves)
        seconds = time.perf_counter() - start
        slow = f"{EXCEEDED}{limit:g} s: {seconds:.3g} s a call at N = {n}"
        return First(one, slow if seconds > limit else MEASURED, seconds, result)


def measure(case: Case, rounds: int, limit: float, before: Mapping[str, Row]) -> list[Row]:
    """A row for each contender of a case; `before` holds those of the size before."""
    operands = case.operands()
    leaves = [operand.detach() for operand in operands]
    firsts = [First.of(one, leaves, limit, before.get(one.name)) for one in contenders(case)]
    errors = _check(firsts, _exact(case, *leaves), leaves)
    timed = {first.contender.name: first for first in firsts if first.outcome == MEASURED}
    timings = interleaved(
        {name: _measurement(first, operands) for name, first in timed.items()},
        rounds,
        measure=lambda run: run(),
        at_most={name: SLOW_ROUNDS for name, first in timed.items() if first.seconds > SLOW},
    )
    compared = ratios({name: timing.median for name, timing in timings.items()}, case)
    rows: list[Row] = []
    for first in firsts:
        name = first.contender.name
        row: Row = {"contender": name, **case.labels(), "outcome": first.outcome}
        if name in timings:
            row["seconds"] = timings[name]
        rows.append(row | errors.get(name, {}) | (compared if name == CPU else {}))
    return rows


def _hopeless(before: Row | None, n: int, limit: float) -> str | None:
    short = before is not None and before["outcome"] == MEASURED and before["seconds"].median < SETTLED
    return None if short else hopeless(before, n, limit)


def _measurement(first: First, operands: tuple[Tensor, Tensor, Tensor]) -> Callable[[], float]:
    run = forward_backward(first.contender.loss, *operands)
    return partial(host_seconds, run) if first.seconds > SLOW else repeated(run, SHORTEST)


def _exact(case: Case, x: Tensor, y: Tensor, scale: Tensor) -> Result:
    """In float64 of the operands as rounded."""
    if case.n <= STANDARD_UP_TO:
        return truth(x, y, scale, case.target())
    return Result.of(case.fused("chunked"), x.double(), y.double(), scale.double())


def _check(firsts: Sequence[First], exact: Result, leaves: Sequence[Tensor]) -> dict[str, Row]:
    """The errors of every contender that was called. Raises AssertionError where one is further off than the library's
    bounds allow, or, of one that rounds its logits, than ROUNDED."""
    x, y, scale = leaves
    found = {first.contender: first.result for first in firsts if first.result is not None}
    held = {one.name: result for one, result in found.items() if not one.rounding}
    problems.check_equal({"float64": exact, **held}, x, y, scale)
    errors: dict[str, Row] = {}
    for one, result in found.items():
        each = problems.relative_errors(result, exact, x, scale)
        for name, error in each.items():
            if one.rounding and not error <= ROUNDED:
                raise AssertionError(f"{one.name}: {name} is off by {error:.1e} of its size, more than {ROUNDED:g}")
        gradients = max(error for name, error in each.items() if name != "loss")
        errors[one.name] = {"loss error": each["loss"], "gradient error": gradients}
    return errors


def ratios(medians: Mapping[str, float], case: Case) -> Row:
    """How many times as long as this library's every other contender takes, the goal, and whether it is reached: None
    where there is no goal at this size or nothing to compare with."""
    if CPU not in medians:
        return {}
    over = {f"over {name}": seconds / medians[CPU] for name, seconds in medians.items() if name != CPU}
    ratio = over.pop(f"over {DENSE if case.dtype == F32 else DENSE_IN_FLOAT32}", None)
    row: Row = {f"over {DENSE}": ratio} if case.dtype == F32 else {}
    goal = next((goal for size, goal in reversed(GOALS.items()) if size <= case.n), None)
    row |= over | {"over dense float32": ratio, "goal": goal}
    return row | {"reached": None if goal is None or ratio is None else ratio >= goal}
