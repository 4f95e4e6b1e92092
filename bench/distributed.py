"""The loss over ranks on one machine: peak memory and bytes sent per rank, and the error of a bfloat16 exchange.

python -m bench distributed                     8,192 pairs on 1, 2 and 4 ranks
python -m bench distributed --pairs 65536 --ranks 4

Every rank is a process with one thread, and they share the machine's cores: seconds are those of the machine, not of a
cluster. Rows go to bench/results/distributed/.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from softclip_kernels import Exchange, Mix, Target, Teacher, softclip_loss
from softclip_kernels.distributed import torch_private
from softclip_kernels.testing import FIELDS, Result, assert_as_accurate_as_dense, matching_rows, unit_rows

from . import Row, memory, problems
from .records import Record, table

LABELS = ("table", "loss", "exchange", "backend", "ranks", "plan", "pairs", "width", "scale")
MIB = 2**20
CHECKED_PAIRS = 512
ROUNDED_PAIRS = 2048
NOISE = 4.0  # between the pairs whose rounding is measured: a batch in the middle of training, far from a loss of 0
PLANS = ("gather", "ring")
# Loss and dtype of the exchange, for the memory; and the losses whose columns bring something else each.
CASES = (("hard", None), ("hard", torch.bfloat16), ("psd", None))
ROUNDED_LOSSES = ("hard", "psd", "psd_teacher")
SCALES = (14.3, 100.0)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench distributed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8192, help="of the global batch")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args(arguments)
    record = Record("distributed", "cpu", LABELS)
    rows = []
    for loss, dtype in CASES:
        for ranks in options.ranks:
            for plan in PLANS if ranks > 1 else PLANS[:1]:
                if ranks > 1 or dtype is None:
                    rows.append(measured(loss, dtype, plan, ranks, options.pairs, options.width, options.backend))
                    record.add(rows[-1:])
    print(table(rows), end="\n\n")
    rows = rounding_errors(options.width)
    record.add(rows)
    print(f"{table(rows)}\n\nwritten to {record.path}")


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """What function(rank, ranks, *arguments) returns on each rank of a process group, in processes of their own."""
    os.environ.update(memory.AT_ONCE, OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (folder, function, ranks, arguments), nprocs=ranks, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(rank: int, folder: str, function: Callable[..., Any], ranks: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    torch.save(function(rank, ranks, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measured(loss: str, dtype: torch.dtype | None, plan: str, ranks: int, pairs: int, width: int, backend: str) -> Row:
    """One row: the most of any rank."""
    found = on_ranks(_memory_and_bytes, ranks, loss, dtype, plan, pairs, width, backend)
    return {
        "table": "memory",
        "loss": loss,
        "exchange": problems.dtype_name(dtype or torch.float32),
        "backend": backend,
        "ranks": ranks,
        "plan": plan if ranks > 1 else "-",
        "pairs": pairs,
        "width": width,
        "inputs MiB": pairs // ranks * width * 4 * 2 / MIB,
        "peak MiB beyond inputs": max(one["peak"] for one in found) / MIB,
        "sent MiB": max(one["sent"] for one in found) / MIB,
        "machine seconds": max(one["seconds"] for one in found),
    }


def _memory_and_bytes(
    rank: int, ranks: int, loss: str, dtype: torch.dtype | None, plan: str, pairs: int, width: int, backend: str
) -> Row:
    _check(loss, Exchange(dist.group.WORLD, plan), rank, ranks, width, backend)
    exchange = Exchange(dist.group.WORLD, plan, dtype)
    x, y, scale, target = _share(loss, rank, ranks, pairs, width)
    sent = _Counter()
    dist.barrier()
    start = time.perf_counter()
    peak = memory.growth(lambda: _loss(target, exchange, backend)(x, y, scale).backward())
    return {"peak": peak, "sent": sent.total, "seconds": time.perf_counter() - start}


def _loss(target: Target, exchange: Exchange, backend: str) -> problems.Loss:
    return lambda x, y, scale: softclip_loss(x, y, scale, target, group=exchange, backend=backend)


def _share(loss: str, rank: int, ranks: int, pairs: int, width: int) -> tuple[Tensor, Tensor, Tensor, Target]:
    x, y, scale = problems.operands(pairs, width, torch.float32)
    own = slice(pairs * rank // ranks, pairs * (rank + 1) // ranks)
    x, y = (operand.detach()[own].clone().requires_grad_() for operand in (x, y))
    return x, y, scale, problems.target(loss, pairs, width, torch.float32)


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
    x, y, scale = (operand.detach() for operand in problems.operands(CHECKED_PAIRS, width, torch.float32))
    assert_as_accurate_as_dense(whole, x, y, scale, target)


class _Counter:
    """Bytes that this rank sends: point to point and all-to-all as they are; for an all-gather its own share once to
    every other rank, or as many bytes of others that it passes on."""

    def __init__(self) -> None:
        self.total = 0
        point_to_point, world = dist.batch_isend_irecv, dist.get_world_size()

        def batch(operations: list[Any]) -> list[Any]:
            self.total += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
            return point_to_point(operations)

        gather, to_all = torch_private.all_gather_into, dist.all_to_all_single

        def gathering(output: Tensor, own: Tensor, **options: Any) -> Any:
            self.total += (world - 1) * own.nbytes
            return gather(output, own, **options)

        def exchanging(output: Tensor, own: Tensor, *arguments: Any, **options: Any) -> Any:
            self.total += own.nbytes * (world - 1) // world
            return to_all(output, own, *arguments, **options)

        vars(dist).update(batch_isend_irecv=batch, all_to_all_single=exchanging)
        vars(torch_private).update(all_gather_into=gathering)


def rounding_errors(width: int) -> list[Row]:
    """What exchange dtype bfloat16 changes, by a real exchange of two ranks: gradients by norm, relative to those of an
    exchange in float32."""
    found = on_ranks(_results, 2, width)
    rows: list[Row] = []
    for index, (loss, scale) in enumerate((loss, scale) for loss in ROUNDED_LOSSES for scale in SCALES):
        row: Row = {"table": "rounding", "loss": loss, "pairs": ROUNDED_PAIRS, "width": width, "scale": scale}
        for field in FIELDS:
            exact, rounded = (torch.cat([of_rank[index][which][field] for of_rank in found]) for which in (0, 1))
            if field in ("loss", "dscale"):
                exact, rounded = exact.mean(), rounded.mean()
            row[f"{field} relative error"] = ((rounded - exact).norm() / exact.norm()).item()
            if field == "loss":
                row["value"] = exact.item()
        rows.append(row)
    return rows


def _results(rank: int, ranks: int, width: int) -> list[list[dict[str, Tensor]]]:
    """Of every loss and scale, this rank's results of an exchange in float32 and in bfloat16, every one (-1, ...)."""
    own = slice(ROUNDED_PAIRS * rank // ranks, ROUNDED_PAIRS * (rank + 1) // ranks)
    x = unit_rows(ROUNDED_PAIRS, width, dtype=torch.float32)
    y = matching_rows(x, noise=NOISE)
    results: list[list[dict[str, Tensor]]] = []
    for loss in ROUNDED_LOSSES:
        target = _own_part(problems.target(loss, ROUNDED_PAIRS, width, torch.float32), own)
        for scale in SCALES:
            of_both: list[dict[str, Tensor]] = []
            for dtype in (None, torch.bfloat16):
                group = Exchange(dist.group.WORLD, "ring", dtype)
                result = Result.of(_loss(target, group, "auto"), x[own], y[own], torch.tensor(scale))
                of_both.append({field: torch.atleast_1d(getattr(result, field)) for field in FIELDS})
            results.append(of_both)
    return results


def _own_part(target: Target, own: slice) -> Target:
    """A teacher's embeddings are a rank's own; everything else may be given for all ranks."""
    if not (isinstance(target, Mix) and isinstance(target.soft, Teacher)):
        return target
    return replace(target, soft=replace(target.soft, a=target.soft.a[own], b=target.soft.b[own]))
