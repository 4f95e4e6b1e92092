"""What a device gives at most: the figures that the kernels' own are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import Row, timing
from ..problems import dtype_name

COPIED = 1 << 30  # bytes: many times what a cache holds
CACHED = 16 << 20  # bytes: L2 holds them, the multiprocessors' own caches do not
REPEATS = 64  # reads of what is cached in one launch, so that launching costs nothing beside them
TIMES = 10  # products in a measurement, for the same reason


@dataclass(frozen=True)
class Sizes:
    """gemm     edge of the large matrices, and N of the logits
    block    edge of a super-block of G
    width    D
    copied, cached  bytes"""

    gemm: int = 8192
    block: int = 4096
    width: int = 512
    copied: int = COPIED
    cached: int = CACHED


@dataclass(frozen=True)
class _Work:
    run: Callable[[], object]
    amount: float  # bytes or floating-point operations
    unit: str


def probe(
    device: str = "cuda", dtype: torch.dtype = torch.bfloat16, sizes: Sizes | None = None, seconds: float = 10.0
) -> list[Row]:
    """A row each: copying, reading L2, and four matrix products, in turns, for so many seconds at least."""
    work = _work(device, dtype, sizes or Sizes())
    timings = timing.interleaved(
        {name: one.run for name, one in work.items()}, seconds=seconds, warm_up=2, measure=timing.device_seconds
    )
    labels: Row = {"kind": "probe", "dtype": dtype_name(dtype)}
    return [
        labels | {"what": name, "rate": one.amount / timings[name].median / 1e12, "unit": one.unit, "s": timings[name]}
        for name, one in work.items()
    ]


def _work(device: str, dtype: torch.dtype, sizes: Sizes) -> dict[str, _Work]:
    from softclip_kernels.backends.triton.launch import add_product  # triton may be missing where this is imported

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device).to(dtype)

    edge, block, width = sizes.gemm, sizes.block, sizes.width
    source, destination = (torch.zeros(sizes.copied // 4, device=device) for _ in range(2))
    cached = torch.zeros(sizes.cached // 4, device=device).expand(REPEATS, -1)
    a, b, out = (matrix(edge, edge) for _ in range(3))
    x, y = matrix(edge, width), matrix(edge, width)
    g, operand = matrix(block, block), matrix(block, width)
    total = torch.zeros(block, width, device=device)
    products = {
        f"{edge} x {edge} x {edge}": (lambda: torch.mm(a, b, out=out), 2 * edge**3),
        f"logits: {edge} x {edge} x {width}": (lambda: torch.mm(x, y.T, out=out), 2 * edge**2 * width),
        f"G @ y: {block} x {width} x {block}": (lambda: add_product(total, g, operand), 2 * block**2 * width),
        f"G.T @ x: {block} x {width} x {block}": (lambda: add_product(total, g.T, operand), 2 * block**2 * width),
    }
    return {
        # A copy reads and writes. Rows of a sum are read whole, in wide loads, each by several multiprocessors.
        "copy": _Work(lambda: destination.copy_(source), 2 * sizes.copied, "TB/s"),
        f"L2, {sizes.cached >> 20} MiB summed": _Work(lambda: cached.sum(1), REPEATS * sizes.cached, "TB/s"),
        **{name: _Work(_often(run), TIMES * amount, "TFLOP/s") for name, (run, amount) in products.items()},
    }


def _often(run: Callable[[], object]) -> Callable[[], object]:
    return lambda: [run() for _ in range(TIMES)]
