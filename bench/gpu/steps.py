"""What `python -m bench gpu` checks and measures of the Triton kernels: correctness and repeats, speed beside rivals,
memory, a million rows, the first call. `correctness`, `speed`, `memory`, `million` and `first_call` are steps: each
returns a row.

A row's rivals, all on the same bfloat16 operands:

    eager autocast        the dense loss under torch.autocast(bfloat16), as training loops evaluate it: logits in
                          bfloat16, softmaxes and cross-entropy in float32. The goals "over eager" mean this one,
                          because its sums are float32 as the library's are
    compiled autocast     torch.compile of the same function; the goal "over torch.compile"
    open_clip autocast    open_clip's formula, hard or distilled, under the same autocast; no goal
    eager bf16            the dense loss in bfloat16 throughout, softmaxes too: less traffic, few digits; no goal
    linear_cross_entropy  torch's own loss without a matrix of logits, from torch 2.13 on (hard); no goal

"share of gemm" is over products timed in the same rounds; "share of gemm at equal clock" is that times the products'
clock over the loss's own, where both are known (clock.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from softclip_kernels import softclip_loss
from softclip_kernels.testing import FIELDS, Result

from .. import Row, problems, timing
from ..problems import BUILT_IN, PRODUCTS, Case
from .clock import Clock
from .goals import COMPILED, EAGER, MEMORY, MIB, goals

OPEN_CLIP, EAGER_BF16 = "open_clip autocast", "eager bf16"
RIVALS = {
    "hard": (EAGER, OPEN_CLIP, EAGER_BF16, BUILT_IN),
    "psd": (EAGER, EAGER_BF16),  # open_clip has no loss that teaches itself
    "psd_teacher": (EAGER, OPEN_CLIP, EAGER_BF16),
}
# Bytes an entry of the N x N matrix that a rival, hard or soft, holds at its peak: larger ones are not attempted.
BYTES = {EAGER: (26, 48), COMPILED: (26, 48), OPEN_CLIP: (28, 60), EAGER_BF16: (14, 28), "float32": (28, 48)}
BYTES[BUILT_IN] = (1, 1)  # a piece of the logits
EQUAL_CLOCK = "share of gemm at equal clock"
GEMMS = 10  # products a measurement, about as long as a fused pass


def correctness(case: Case, repeats: int, mib: str = "") -> Row:
    """The library's standard on a ragged size, then repeats that must agree bit by bit; with this SOFTCLIP_GPU_MIB."""
    with mock.patch.dict(os.environ, {MIB: mib}):
        return _correctness(case, repeats)


def _correctness(case: Case, repeats: int) -> Row:
    problems.check(case.loss, case.d, case.dtype, case.device, "triton", case.n)
    x, y, scale = (leaf.detach() for leaf in case.operands())
    fused = case.fused("triton")
    first = Result.of(fused, x, y, scale)
    for index in range(repeats):
        again = Result.of(fused, x, y, scale)
        differing = first.differing(again)
        if differing:
            raise AssertionError(f"{', '.join(differing)} differ in repeat {index + 1}")
    return {"passed": True, "repeats": repeats}


def speed(case: Case, rivals: Sequence[str], with_hard: bool, rounds: int, seconds: float, gemm: int) -> Row:
    """Checked, then timed beside its rivals, the hard loss and products of (gemm, gemm) matrices, interleaved.
    `with_hard` is False where the hard loss is wrong at this size. What the tuner measured meanwhile is in the row."""
    from softclip_kernels.backends.triton import tuning  # here, for processes without triton

    known = tuning.measurements()
    x, y, scale = case.operands()
    fused = case.fused("triton")
    row: Row = {"checked against": check(case, fused, x, y, scale)}
    contenders: dict[str, Callable[[], object]] = {
        "fused": timing.forward_backward(fused, x, y, scale),
        "fused forward": timing.forward_only(fused, x, y, scale),
    }
    if with_hard and case.loss != "hard":
        contenders["hard"] = timing.forward_backward(replace(case, loss="hard").fused("triton"), x, y, scale)
    contenders["gemm"] = gemm_run(case, gemm)
    row |= add_rivals(contenders, rivals, case, (x, y, scale))
    for contender in contenders.values():
        contender()
    torch.cuda.synchronize()
    clock = Clock(case.device)
    with timing.Clocks() as clocks:
        timings = timing.interleaved(contenders, rounds, 1, seconds, clock.device_seconds)
    row |= _figures(case, gemm, timings)
    row |= clocks.summary() | _at_equal_clock(row["share of gemm"], clock, contenders)
    tuned = {key: measured for key, measured in tuning.measurements().items() if key not in known}
    return row | ({"tuning": tuned} if tuned else {})


def gemm_run(case: Case, edge: int) -> Callable[[], object]:
    """GEMMS products of (edge, edge) matrices."""
    a, b, out = (torch.randn(edge, edge, device=case.device).to(case.dtype) for _ in range(3))
    return lambda: [torch.mm(a, b, out=out) for _ in range(GEMMS)]


def add_rivals(
    contenders: dict[str, Callable[[], object]], rivals: Sequence[str], case: Case, operands: tuple[Tensor, ...]
) -> Row:
    """Every rival that can be timed joins the contenders; of another the row says why not."""
    row: Row = {}
    for rival in rivals:
        start = time.monotonic()
        loss = _rival(rival, case)
        run = timing.forward_backward(loss, *operands)
        size = _bytes(case, rival)
        why = (rival == BUILT_IN and problems.why_no_built_in()) or why_not_timed(run, size)
        seconds = time.monotonic() - start
        if rival == BUILT_IN:  # the only one that is not written here
            why = why or why_not_timed(partial(check, case, loss, *operands), size)
        if not why:
            contenders[rival] = run
        row[rival if why else f"{rival}, first call s"] = why or seconds
    return row


def check(case: Case, loss: problems.Loss, x: Tensor, y: Tensor, scale: Tensor) -> str:
    """Against float32: dense where it fits, else the library's chunked backend, which is plain PyTorch, in tf32 for the
    sake of time. How accurate a right result is, is checked before, on sizes that fit in float64."""
    if _fits(_bytes(case, "float32")):
        kind, exact = "dense float32", case.in_float32()
    else:
        kind, exact = "chunked tf32", replace(case, dtype=torch.float32).fused("chunked")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if kind == "dense float32" else "high")
    try:
        expected = Result.of(exact, x.float(), y.float(), scale)
    finally:
        torch.set_float32_matmul_precision(precision)
    got = Result.of(loss, x, y, scale)
    for field in FIELDS:
        check_close(field, getattr(got, field), getattr(expected, field))
    return kind


def check_close(what: str, got: Tensor, expected: Tensor, relative: float = 0.02, against: str = "float32") -> None:
    """By norm, for a size at which float64 does not fit. Raises AssertionError."""
    error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error <= relative:
        raise AssertionError(f"{what} differs from {against} by {error:.1e}, not by {relative:.0e}")


def _rival(rival: str, case: Case) -> problems.Loss:
    if rival == OPEN_CLIP:
        return problems.under_autocast(problems.open_clip(case), case.device)
    if rival == EAGER_BF16:
        return case.dense()
    if rival == BUILT_IN:
        return problems.built_in
    eager = problems.under_autocast(case.dense(), case.device)
    if rival == EAGER:
        return eager
    torch._dynamo.reset()  # sizes are constants of the compiled code, as in training
    return torch.compile(eager, dynamic=False)


def _bytes(case: Case, rival: str) -> int:
    return BYTES[rival][case.loss != "hard"] * case.n**2


def _fits(size: int) -> bool:
    torch.cuda.empty_cache()
    return size < torch.cuda.mem_get_info()[0]


def why_not_timed(run: Callable[[], object], size: int) -> str | None:
    """A rival that does not fit, or fails in its own way, is no failure of the library. None where it can be timed."""
    if not _fits(size):
        return "does not fit"
    try:
        run()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "does not fit"
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error)[:500]}"
    return None


def _figures(case: Case, gemm: int, timings: Mapping[str, timing.Timing]) -> Row:
    row: Row = dict(timings)
    fused = timings["fused"].median
    row["TFLOP/s"] = PRODUCTS[case.loss] * case.n**2 * case.d / fused / 1e12
    row["gemm TFLOP/s"] = GEMMS * 2 * gemm**3 / timings["gemm"].median / 1e12
    row["share of gemm"] = row["TFLOP/s"] / row["gemm TFLOP/s"]
    if "hard" in timings:
        row["over hard"] = fused / timings["hard"].median
    for rival in BYTES.keys() & timings.keys():
        row[f"over {rival}"] = timings[rival].median / fused
    return row | {"goals": goals(case.loss, case.n, case.d, row)}


def _at_equal_clock(share: float, clock: Clock, contenders: Mapping[str, Callable[[], object]]) -> Row:
    """The share if both had run at one clock; where a clock is not known, why there is none."""
    fused, gemm = clock.of(contenders["fused"]), clock.of(contenders["gemm"])
    if fused is None or gemm is None:
        return {EQUAL_CLOCK: f"clock not known: {clock.problem}"}
    return {"fused MHz": fused, "gemm MHz": gemm, EQUAL_CLOCK: share * gemm / fused}


def memory(case: Case) -> Row:
    """The allocator's peak during a second forward and backward pass, beyond inputs and gradients: as it comes, and
    with the limit that the goal is for."""
    x, y, scale = case.operands()
    run = timing.forward_backward(case.fused("triton"), x, y, scale)

    def beyond(limit: str) -> int:
        with mock.patch.dict(os.environ, {MIB: limit}):
            run()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - x.nbytes - y.nbytes

    allowed = MEMORY[0] + MEMORY[1] * case.n
    least = beyond(str(MEMORY[0] // 2**20))
    return {
        "MiB beyond inputs and gradients": beyond("") / 2**20,
        f"with {MIB}={MEMORY[0] // 2**20}": least / 2**20,
        "MiB allowed then": allowed / 2**20,
        "goals": {"memory beyond inputs and gradients": least <= allowed},
    }


def million(case: Case) -> Row:
    """Hard, forward and backward, on one device; some rows' and columns' losses and gradients checked."""
    x, y, scale = case.operands()
    torch.cuda.synchronize()
    start = time.monotonic()
    losses = softclip_loss(x, y, scale, reduction="none", backend="triton")
    dx, dy, dscale = torch.autograd.grad(0.5 * (losses[0].mean() + losses[1].mean()), (x, y, scale))
    torch.cuda.synchronize()
    seconds = time.monotonic() - start
    if not all(bool(one.isfinite().all()) for one in (*losses, dx, dy, dscale)):
        raise AssertionError("not finite")
    with torch.no_grad():
        check_some_rows(x, y, scale, losses[0], losses[1], dx)
        check_some_rows(y, x, scale, losses[1], losses[0], dy)
    return {"outcome": "completed", "passed": True, "seconds": seconds}


def check_some_rows(
    x: Tensor, y: Tensor, scale: Tensor, loss: Tensor, other_loss: Tensor, dx: Tensor, count: int = 8
) -> None:
    """The last `count` rows against all columns, in float32. The columns' log-sum-exps, which their gradients take, are
    the columns' losses plus the pairs' logits."""
    n, rows = len(x), slice(len(x) - count, len(x))
    columns = y.float()
    z = scale * x[rows].float() @ columns.T
    pair = z[:, rows].diagonal()
    check_close("the sampled losses", loss[rows], z.logsumexp(1) - pair)
    other_log_sum_exp = other_loss + scale * (x.float() * columns).sum(1)
    g = (z.softmax(1) + (z - other_log_sum_exp).exp()) / (2 * n)
    g[:, rows].diagonal().sub_(1 / n)
    check_close("the sampled gradients", dx[rows], scale * g @ columns)


def first_call(case: Case) -> Row:
    """How long the first forward and backward pass of a process takes; for one where no kernel was compiled and no tile
    shape measured before."""
    x, y, scale = case.operands()
    run = timing.forward_backward(case.fused("triton"), x, y, scale)
    (x @ y[:1].T).sum().item()  # the libraries and the context
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"first call s": seconds[0], "second call s": seconds[1]}
