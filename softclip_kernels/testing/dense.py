"""The dense loss, written independently of the library's own way: it builds the targets as matrices, and shares neither
terms nor kernels with what it is to judge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..targets.base import Target
from ..targets.combine import Average, Blocks, ForBatch, Mix, Weighted
from ..targets.hard import Dense, Hard
from ..targets.soft import Potentials, Ratio, Scale, SelfTeacher, Sinkhorn, SoftTarget, Teacher


class DenseTarget(NamedTuple):
    """A target in full: rows and columns (N, M), the pairs that may see each other (N, M) bool, weights (N,), (M,)."""

    rows: Tensor
    columns: Tensor
    allowed: Tensor
    row_weight: Tensor
    column_weight: Tensor


def dense_target(target: Target, x: Tensor, y: Tensor, scale: Tensor) -> DenseTarget:
    """Every matrix of a target, from its definition, in x's dtype; O(N * M) memory."""
    x, y, scale = x.detach(), y.detach(), scale.detach()
    allowed = torch.ones(len(x), len(y), dtype=torch.bool, device=x.device)
    row_weight, column_weight = x.new_ones(len(x)), x.new_ones(len(y))
    while isinstance(target, (Blocks, ForBatch, Weighted)):
        if isinstance(target, Blocks):
            allowed = target.rows[:, None] == target.columns[None, :]
        elif isinstance(target, Weighted):
            weights = target.weights if isinstance(target.weights, tuple) else (target.weights, target.weights)
            row_weight, column_weight = row_weight * weights[0], column_weight * weights[1]
        target = target.target
    rows, columns = _matrices(target, _Batch(x, y, scale, allowed))
    return DenseTarget(rows, columns, allowed, row_weight, column_weight)


class _Batch(NamedTuple):
    """What a target's matrices depend on: x (N, D), y (M, D), the scale, and which pairs may see each other (N, M)."""

    x: Tensor
    y: Tensor
    scale: Tensor
    allowed: Tensor


def _matrices(target: Target, batch: _Batch) -> tuple[Tensor, Tensor]:
    x, allowed = batch.x, batch.allowed
    if isinstance(target, Hard):
        return _hard_matrices(target, x, allowed)
    if isinstance(target, Dense):
        rows = target.rows.to(x.dtype)
        return rows, rows if target.columns is None else target.columns.to(x.dtype)
    if isinstance(target, Mix):
        alpha = target.alpha if isinstance(target.alpha, tuple) else (target.alpha, target.alpha)
        row_alpha, column_alpha = (
            torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1) for value in alpha
        )
        hard, soft = (_matrices(part, batch) for part in (target.hard, target.soft))
        return (
            (1 - row_alpha)[:, None] * hard[0] + row_alpha[:, None] * soft[0],
            (1 - column_alpha)[None, :] * hard[1] + column_alpha[None, :] * soft[1],
        )
    if isinstance(target, Average):
        weights = torch.tensor(target.weights or [1.0] * len(target.targets), dtype=torch.float64)
        parts = [_matrices(part, batch) for part in target.targets]
        shares = (weights / weights.sum()).tolist()
        return (
            sum((share * part[0] for share, part in zip(shares, parts, strict=True)), torch.zeros_like(parts[0][0])),
            sum((share * part[1] for share, part in zip(shares, parts, strict=True)), torch.zeros_like(parts[0][1])),
        )
    if isinstance(target, SoftTarget):
        return _soft_matrices(target, batch)
    raise TypeError(f"no dense form of {type(target).__name__} is known")


def _hard_matrices(target: Hard, x: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    match = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device)
    if target.groups is not None:
        match = (target.groups[0][:, None] == target.groups[1][None, :]).to(x.dtype)
        rows, columns = (match / match.sum(dim, keepdim=True).clamp(min=1) for dim in (1, 0))
    else:
        labels = torch.arange(len(x), device=x.device) if target.labels is None else target.labels
        match[torch.arange(len(x), device=x.device), labels.long()] = 1.0
        rows = columns = match
    seen = allowed.to(x.dtype)
    s = target.smoothing
    return (
        (1 - s) * rows + s * seen / seen.sum(1, keepdim=True).clamp(min=1),
        (1 - s) * columns + s * seen / seen.sum(0, keepdim=True).clamp(min=1),
    )


def _soft_matrices(target: SoftTarget, batch: _Batch) -> tuple[Tensor, Tensor]:
    x, y, scale, allowed = batch
    if isinstance(target, Teacher):
        own = _own_scale(target.scale, scale, x)
        t = own * target.a.to(x.dtype) @ target.b.to(x.dtype).T
    else:
        assert isinstance(target, SelfTeacher)
        own = _own_scale(target.scale, scale, x)
        t = own * x @ y.T
        t = t.T if target.swap == "paired" else t
    t = t.masked_fill(~allowed, -torch.inf)
    if target.normalise in ("row", "column"):
        over_columns, over_rows = (t.softmax(dim).nan_to_num(0.0) for dim in (1, 0))  # NaN: everything excluded
        return (over_columns, over_rows) if target.normalise == "row" else (over_rows, over_columns)
    if isinstance(target.normalise, Potentials):
        plan = (t + target.normalise.row[:, None].to(t) + target.normalise.column[None, :].to(t)).exp()
        return plan, plan
    for _ in range((target.normalise if isinstance(target.normalise, Sinkhorn) else Sinkhorn()).iterations):
        for dim in (0, 1):
            t = t.log_softmax(dim).masked_fill(~allowed, -torch.inf)  # a log_softmax over nothing is NaN
    return t.exp(), t.exp()


def _own_scale(given: Scale, students: Tensor, x: Tensor) -> Tensor:
    if isinstance(given, Ratio):
        return given.value * students.to(x.dtype)
    return torch.as_tensor(students if isinstance(given, str) else given, dtype=x.dtype, device=x.device)


def dense_row_losses(x: Tensor, y: Tensor, scale: Tensor, target: DenseTarget) -> tuple[Tensor, Tensor]:
    """The definition: (N,) and (M,) losses from stored logits and targets, all in x's dtype, differentiable."""
    z = scale.to(x.dtype) * x @ y.T
    row_loss = target.rows.sum(1) * _log_sum_exp(z, target.allowed, 1) - (target.rows * z).sum(1)
    column_loss = target.columns.sum(0) * _log_sum_exp(z, target.allowed, 0) - (target.columns * z).sum(0)
    return target.row_weight * row_loss, target.column_weight * column_loss


def _log_sum_exp(z: Tensor, allowed: Tensor, dim: int) -> Tensor:
    """Over the allowed entries; 0 where there are none, with zero gradient."""
    some = allowed.any(dim, keepdim=True)
    return torch.where(some, z.masked_fill(~allowed & some, -torch.inf).logsumexp(dim, keepdim=True), 0.0).squeeze(dim)


def dense_loss(x: Tensor, y: Tensor, scale: Tensor, target: Target | None = None, direction: str = "both") -> Tensor:
    """What softclip_loss(x, y, scale, target, direction=direction) must equal, computed densely in x's dtype."""
    rows, columns = dense_row_losses(x, y, scale, dense_target(target or Hard(), x, y, scale))
    means = {"rows": rows.mean(), "columns": columns.mean(), "both": 0.5 * (rows.mean() + columns.mean())}
    return means[direction]
