"""The loss over ranks on one machine: peak memory and bytes sent per rank, and the error of a bfloat16 exchange.

python -m bench distributed                     8,192 pairs on 1, 2 and 4 ranks
python -m bench distributed --pairs 65536 --ranks 4

Every rank is a process with one thread, and they share the machine's cores: seconds are those of the machine, not of a
cluster. Rows go to bench/results/distributed.json.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from softclip_kernels import Exchange, Target, agreement, distributed, softclip_loss
from softclip_kernels.testing import Result, assert_as_accurate_as_dense, matching_rows, unit_rows

from . import common

Row = dict[str, Any]
MIB = 2**20
CHECKED_PAIRS = 512
NOISE = 4.0  # between the pairs whose rounding is measured: a batch in the middle of training, far from a loss of 0
PLANS = ("gather", "ring")
LOSSES = ("hard", "psd")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench distributed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8192, help="of the global batch")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args(arguments)
    memory = [
        measured(loss, plan, ranks, options.pairs, options.width, options.backend)
        for loss in LOSSES
        for ranks in options.ranks
        for plan in (PLANS if ranks > 1 else PLANS[:1])
    ]
    print(common.table(memory), end="\n\n")
    errors = [rounding_error(scale, options.width) for scale in (14.3, 100.0)]
    print(common.table(errors))
    print(f"\n{common.write('distributed', 'cpu', memory + errors)}")


def measured(loss: str, plan: str, ranks: int, pairs: int, width: int, backend: str) -> Row:
    """One row: the most of any rank, in processes of their own."""
    # What is freed goes back to the system at once, so that resident memory is what is in use.
    os.environ.update(OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, (folder, loss, plan, ranks, pairs, width, backend), nprocs=ranks, start_method="spawn"
        )
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    return {
        "loss": loss,
        "ranks": ranks,
        "plan": plan if ranks > 1 else "-",
        "pairs": pairs,
        "width": width,
        "inputs MiB": pairs // ranks * width * 4 * 2 / MIB,
        "peak MiB beyond inputs": max(one["peak"] for one in found) / MIB,
        "sent MiB": max(one["sent"] for one in found) / MIB,
        "machine seconds": max(one["seconds"] for one in found),
    }


def _rank(rank: int, folder: str, loss: str, plan: str, ranks: int, pairs: int, width: int, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    exchange = Exchange(dist.group.WORLD, plan)
    _check(loss, exchange, rank, ranks, width, backend)
    x, y, scale, target = _share(loss, rank, ranks, pairs, width)
    sent = _Counter()
    dist.barrier()
    before = _reset_peak()
    start = time.perf_counter()
    _loss(target, exchange, backend)(x, y, scale).backward()
    seconds = time.perf_counter() - start
    torch.save({"peak": _peak() - before, "sent": sent.total, "seconds": seconds}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _loss(target: Target, exchange: Exchange | None, backend: str) -> common.Loss:
    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        value = softclip_loss(x, y, scale, target, group=exchange, backend=backend)
        assert isinstance(value, Tensor)
        return value

    return loss


def _share(loss: str, rank: int, ranks: int, pairs: int, width: int) -> tuple[Tensor, Tensor, Tensor, Target]:
    x, y, scale = common.operands(pairs, width, torch.float32)
    own = slice(pairs * rank // ranks, pairs * (rank + 1) // ranks)
    x, y = (operand.detach()[own].clone().requires_grad_() for operand in (x, y))
    return x, y, scale, common.target(loss, pairs, width, torch.float32)


def _check(loss: str, exchange: Exchange, rank: int, ranks: int, width: int, backend: str) -> None:
    """Correctness first: the ranks' assembled result at a small size, by the library's standard."""
    x, y, scale, target = _share(loss, rank, ranks, CHECKED_PAIRS, width)
    own = Result.of(_loss(target, exchange, backend), x, y, scale)
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, own)
    whole = Result(
        torch.stack([part.loss for part in parts]).mean(),
        torch.cat([part.dx for part in parts]) / ranks,
        torch.cat([part.dy for part in parts]) / ranks,
        torch.stack([part.dscale for part in parts]).mean(),
    )
    x, y, scale = (operand.detach() for operand in common.operands(CHECKED_PAIRS, width, torch.float32))
    assert_as_accurate_as_dense(whole, x, y, scale, target)


class _Counter:
    """Bytes that this rank sends: point to point as they are; for a collective, what its volume is by definition, every
    rank's share of the result to every other rank."""

    def __init__(self) -> None:
        self.total = 0
        point_to_point, world = dist.batch_isend_irecv, dist.get_world_size()

        def batch(operations: list[Any]) -> list[Any]:
            self.total += sum(_bytes(one.tensor) for one in operations if one.op is dist.isend)
            return point_to_point(operations)

        gather, scatter, to_all = agreement.all_gather_into, distributed._reduce_scatter_into, dist.all_to_all_single

        def gathering(output: Tensor, own: Tensor, **options: Any) -> Any:
            self.total += (world - 1) * _bytes(own)
            return gather(output, own, **options)

        def scattering(output: Tensor, own: Tensor, **options: Any) -> Any:
            self.total += (world - 1) * _bytes(output)
            return scatter(output, own, **options)

        def exchanging(output: Tensor, own: Tensor, *arguments: Any, **options: Any) -> Any:
            self.total += _bytes(own) * (world - 1) // world
            return to_all(output, own, *arguments, **options)

        vars(dist).update(batch_isend_irecv=batch, all_to_all_single=exchanging)
        vars(agreement).update(all_gather_into=gathering)
        vars(distributed).update(all_gather_into=gathering, _reduce_scatter_into=scattering)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The most resident memory since the reset, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def rounding_error(scale: float, width: int, pairs: int = 2048) -> Row:
    """What exchange dtype bfloat16 changes: the result is exactly that of rounded column embeddings, so one process
    shows it. Gradients by norm, relative."""
    x = unit_rows(pairs, width, dtype=torch.float32)
    y = matching_rows(x, noise=NOISE)
    target = common.target("psd", pairs, width, torch.float32)
    exact, rounded = (
        Result.of(_loss(target, None, "auto"), x, columns, torch.tensor(scale)) for columns in (y, y.bfloat16().float())
    )
    row: Row = {"exchange": "bfloat16", "pairs": pairs, "width": width, "scale": scale, "loss": exact.loss.item()}
    for field in ("loss", "dx", "dy", "dscale"):
        of, to = getattr(exact, field), getattr(rounded, field)
        row[f"{field} relative error"] = ((to - of).norm() / of.norm()).item()
    return row
