"""TwoPass against a plain step on the CPU: what encoding twice costs in time and saves in memory.

python -m bench two_pass

A batch of random vectors is encoded by two small MLPs, and the hard loss is taken of the whole batch: by one pass,
which keeps the activations of the whole batch, and by TwoPass in more and more micro-batches, which keeps those of one.
Gradients are compared first. Times are interleaved; peaks are those of a fresh process each, beyond model and batch.
Rows go to bench/results/two_pass/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softclip_kernels import TwoPass, softclip_loss

from . import Row, memory
from .records import Record, table
from .timing import interleaved

LABELS = ("batch", "width", "layers", "micro-batches", "threads")
PLAIN = 0  # micro-batches: none, one pass
RELATIVE = 1e-4  # of a gradient, by norm: sums over a batch in another order


class Towers(nn.Module):
    """Two MLPs of so many hidden layers, and a logit scale."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleList(
            nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers))) for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (F.normalize(tower(data), dim=1) for tower, data in zip(self.towers, (images, texts), strict=True))
        return x, y, self.log_scale.exp()


def step(batch: int, width: int, layers: int, micro_batches: int) -> Callable[[], list[Tensor]]:
    """One step's forward and backward pass, which returns the parameters' gradients."""
    model = Towers(width, layers)
    images = torch.randn(batch, width)
    texts = images + torch.randn(batch, width)

    def plain() -> None:
        loss = softclip_loss(*model(images, texts))
        loss.backward()

    def two_pass() -> None:
        passes = TwoPass(model, list(zip(images.chunk(micro_batches), texts.chunk(micro_batches), strict=True)))
        x, y, scale = passes.outputs
        passes.backward(softclip_loss(x, y, scale))

    def run() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        plain() if micro_batches == PLAIN else two_pass()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    return run


def check(steps: dict[str, Callable[[], list[Tensor]]]) -> None:
    """Every step's gradients equal the first one's. Raises AssertionError."""
    (_, first), *others = steps.items()
    expected = first()
    for name, run in others:
        for index, (one, other) in enumerate(zip(expected, run(), strict=True)):
            error = ((one - other).norm() / one.norm()).item()
            assert error <= RELATIVE, (
                f"{name} micro-batches: gradient {index} is off by {error:.1e}, not {RELATIVE:.0e}"
            )


def _growth(threads: int, batch: int, width: int, layers: int, micro_batches: int) -> float:
    """MiB of a step's peak beyond model and batch."""
    torch.set_num_threads(threads)
    step(64, width, layers, micro_batches)()  # libraries load
    return memory.growth(step(batch, width, layers, micro_batches)) / 2**20


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench two_pass", description=__doc__.split("\n\n")[0])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8, 16], help="(default: 2 4 8 16)")
    parser.add_argument("--batch", type=int, default=4096, help="pairs (default: 4096)")
    parser.add_argument("--width", type=int, default=512, help="(default: 512)")
    parser.add_argument("--layers", type=int, default=4, help="of each tower (default: 4)")
    parser.add_argument("--rounds", type=int, default=7, help="of the interleaved timings (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    record = Record("two_pass", "cpu", LABELS)
    size = (options.batch, options.width, options.layers)
    counts = [PLAIN, *options.micro_batches]
    steps = {str(count): step(*size, count) for count in counts}
    check(steps)
    timings = interleaved(steps, options.rounds)
    peaks = {count: memory.in_fresh_process(_growth, options.threads, *size, count) for count in counts}
    rows: list[Row] = [
        {
            "batch": options.batch,
            "width": options.width,
            "layers": options.layers,
            "micro-batches": count,
            "threads": options.threads,
            "seconds": timings[str(count)],
            "of plain time": timings[str(count)].median / timings[str(PLAIN)].median,
            "peak MiB": peaks[count],
            "of plain peak": peaks[count] / peaks[PLAIN],
        }
        for count in counts
    ]
    record.add(rows)
    print(f"{table(rows)}\n\nwritten to {record.path}")
