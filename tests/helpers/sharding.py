"""A problem and its target shared out over ranks, and the ranks' results put together again."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from softclip_kernels import Average, Blocks, Exchange, Hard, Mix, Teacher, Weighted
from softclip_kernels.backends import chunked
from softclip_kernels.targets import ForBatch
from softclip_kernels.testing import (
    ALL_TARGETS,
    FIELDS,
    Result,
    assert_as_accurate_as_dense,
    operands,
    truth,
)

from .ranks import shares

PLANS = ("gather", "ring")
WIDTH = 16


def local_target(target, rows, columns):
    """This rank's share of a target that is given for the whole batch: what has to be local becomes so, what may be
    global stays as it is, so that both ways of giving a vector are seen."""
    if isinstance(target, (Mix, Average, Weighted, Blocks, ForBatch)):
        parts = [name for name in ("hard", "soft", "target") if hasattr(target, name)]
        changes = {name: local_target(getattr(target, name), rows, columns) for name in parts}
        if isinstance(target, Average):
            changes["targets"] = [local_target(part, rows, columns) for part in target.targets]
        return dataclasses.replace(target, **changes)
    if isinstance(target, Hard):
        if target.labels is not None:
            return dataclasses.replace(target, labels=target.labels[rows])
        if target.groups is not None:
            return dataclasses.replace(target, groups=(target.groups[0][rows], target.groups[1][columns]))
    if isinstance(target, Teacher):
        return dataclasses.replace(target, a=target.a[rows], b=target.b[columns])
    return target


def over_ranks(x, y, scale, target, group, plan, exchange_dtype=None, **options):
    return Result.of_loss(x, y, scale, target, group=Exchange(group, plan, exchange_dtype), **options)


def compute(group, names, counts, plan, dtype, backend="auto", direction="both"):
    """On a rank: each named target's loss and gradients of this rank's share, in float64 for the way home."""
    chunked.BLOCK["cpu"] = 48  # small blocks, as in conftest
    rank = dist.get_rank(group)
    rows, columns = (shares(each)[rank] for each in counts)
    found = {}
    for name in names:
        x, y, scale = operands(*map(sum, counts), WIDTH, dtype=dtype)
        own = local_target(ALL_TARGETS[name](len(x), len(y)), rows, columns)
        result = over_ranks(x[rows], y[columns], scale, own, group, plan, backend=backend, direction=direction)
        found[name] = {field: getattr(result, field).double().numpy() for field in FIELDS}
    return found


def assembled(found, name, dtype):
    """The ranks' results as the one that a data-parallel trainer ends with: everything averaged over ranks, where a
    rank's gradient of another rank's embeddings is 0."""
    world = len(found)
    parts = {field: [torch.from_numpy(rank[name][field]) for rank in found] for field in FIELDS}
    return Result(
        torch.stack(parts["loss"]).mean(),
        (torch.cat(parts["dx"]) / world).to(dtype),
        (torch.cat(parts["dy"]) / world).to(dtype),
        torch.stack(parts["dscale"]).mean(),
    )


def check(pool, names, row_counts, column_counts, plan, dtype, backend="auto", direction="both"):
    counts = (row_counts, column_counts)
    found = pool.run(compute, names, counts, plan, dtype, backend, direction, ranks=len(row_counts))
    n, m = sum(row_counts), sum(column_counts)
    for name in names:
        x, y, scale = operands(n, m, WIDTH, dtype=dtype)
        target, result = ALL_TARGETS[name](n, m), assembled(found, name, dtype)
        if dtype != torch.float64:
            assert_as_accurate_as_dense(result, x, y, scale, target, direction=direction)
            continue
        exact = truth(x, y, scale, target, direction=direction)
        for field in FIELDS:
            error = (getattr(result, field) - getattr(exact, field)).abs().max().item()
            assert error <= 1e-10, f"{name}, {field}: {error:.3e}"
