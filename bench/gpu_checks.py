"""What `python -m bench gpu` checks and measures beside speed: correctness, repeats, memory, a million rows, the first
call. Each function is one step, run in a process of gpu_process, and returns a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softclip_kernels import softclip_loss
from softclip_kernels.testing import FIELDS, Result

from . import common, rehearsal

Row = dict[str, Any]
# "Memory beyond inputs and gradients", both in their own dtype: bytes, and bytes a row. 16-bit gradients are summed in
# fp32 before they are rounded; these sums are memory beyond, and the row says how much of it they are.
MEMORY = (64 * 2**20, 64)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def correctness(loss: str, dtype: torch.dtype, n: int, d: int, device: str, repeats: int) -> Row:
    """The library's standard on a ragged size, then repeats that must agree bit by bit."""
    common.check(loss, d, dtype, device, "triton", n)
    x, y, scale = (leaf.detach() for leaf in common.operands(n, d, dtype, device))
    fused = common.fused(common.target(loss, n, d, dtype, device), "triton")
    first = Result.of(fused, x, y, scale)
    for index in range(repeats):
        again = Result.of(fused, x, y, scale)
        differing = [field for field in FIELDS if not torch.equal(getattr(first, field), getattr(again, field))]
        if differing:
            raise AssertionError(f"{', '.join(differing)} differ in repeat {index + 1}")
    return {"passed": True, "repeats": repeats}


def memory(loss: str, dtype: torch.dtype, n: int, d: int, device: str) -> Row:
    """The allocator's peak during a second forward and backward pass, beyond inputs and gradients."""
    x, y, scale = common.operands(n, d, dtype, device)
    run = common.forward_backward(common.fused(common.target(loss, n, d, dtype, device), "triton"), x, y, scale)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - before - x.nbytes - y.nbytes
    sums = 4 * (x.numel() + y.numel()) if x.element_size() < 4 else 0
    allowed = MEMORY[0] + MEMORY[1] * n
    return {
        "MiB beyond inputs and gradients": beyond / 2**20,
        "MiB of these fp32 sums of gradients": sums / 2**20,
        "MiB beyond the sums as well": (beyond - sums) / 2**20,
        "MiB allowed": allowed / 2**20,
        "goals": {"memory beyond inputs and gradients": beyond <= allowed},
    }


def check_close(what: str, got: Tensor, expected: Tensor, relative: float = 0.02) -> None:
    """By norm, for a size at which float64 does not fit. Raises AssertionError."""
    error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error <= relative:
        raise AssertionError(f"{what} differs from float32 by {error:.1e}, not by {relative:.0e}")


def million(n: int, d: int, dtype: torch.dtype, device: str) -> Row:
    """Hard, forward and backward, on one device; some rows' and columns' losses and gradients checked."""
    x, y, scale = common.operands(n, d, dtype, device)
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


def first_call(loss: str, dtype: torch.dtype, n: int, d: int, device: str, seconds: float) -> Row:
    """How long the first forward and backward pass of a process takes where no kernel was compiled and no tile
    shape measured before."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "bench.gpu_checks", loss, name(dtype), str(n), str(d), device]
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
        root = Path(__file__).parent.parent
        try:
            done = subprocess.run(
                command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds, check=True
            )
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"exit code {error.returncode}: {error.stderr[-1500:]}") from None
    first, second = json.loads(done.stdout.splitlines()[-1])
    return {"first call s": first, "second call s": second}


def _time_two_calls(loss: str, dtype: torch.dtype, n: int, d: int, device: str) -> list[float]:
    x, y, scale = common.operands(n, d, dtype, device)
    run = common.forward_backward(common.fused(common.target(loss, n, d, dtype, device), "triton"), x, y, scale)
    (x @ y[:1].T).sum().item()  # the libraries and the context
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    _loss, _dtype, _n, _d, _device = sys.argv[1:]
    if _device == "cpu":
        rehearsal.install()
    print(json.dumps(_time_two_calls(_loss, getattr(torch, _dtype), int(_n), int(_d), _device)))
