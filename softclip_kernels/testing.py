"""For tests and benchmarks, the library's and yours: problems to run on, the dense loss written independently of the
library's own way (no lowering, no kernels), and the rule by which a fused result counts as correct."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import accumulation_dtype
from .targets import Average, Blocks, Dense, ForBatch, Hard, Mix, Target, Weighted
from .teachers import Potentials, SelfTeacher, Sinkhorn, SoftTarget, Teacher


def unit_rows(n: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """(n, d) random rows of unit norm; the same values in every dtype, up to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(device, dtype)


def matching_rows(x: Tensor, *, noise: float = 0.5, seed: int = 1) -> Tensor:
    """Rows that resemble x's, as a trained text encoder's would: unit norm, x's shape, dtype and device."""
    other = unit_rows(*x.shape, seed=seed, device=str(x.device))
    return F.normalize(x.double() + noise * other, dim=1).to(x.dtype)


def contested_cosine(n: int, d: int, scale: float) -> float:
    """The cosine of pairs at which each weighs, at this logit scale, about as much as the other n - 1 rows together,
    all of which are independent, of unit norm and of width d: the log-sum-exp of logits of standard deviation
    s = scale / sqrt(d), which is log n + s^2 / 2 or, where few of them dominate, their largest, over the scale."""
    s, few = scale / d**0.5, (2 * math.log(max(n, 2))) ** 0.5
    log_sum_exp = math.log(n) + s**2 / 2 if s < few else s * few
    return min(log_sum_exp / scale, 0.9)


def contested_rows(x: Tensor, scale: float, *, seed: int = 1) -> Tensor:
    """Rows that resemble x's only as much as it takes for each pair to weigh, at this logit scale, about as much as all
    others of its row and of its column together (`contested_cosine`, but row by row); x's shape, dtype and device.

    The loss is then of order 1 and no gradient is near 0, at every scale: the larger it is, the less alike are pairs.
    With rows that match (`matching_rows`) a loss is 1e-3 at scale 14.3 and 0 at 100, and a kernel that returns no
    gradient at all is hard to tell from one that is right. O(N^2 D) work, O(N) memory.
    """
    wide = x.double()
    wide = wide / wide.norm(dim=1, keepdim=True)
    other = unit_rows(*x.shape, seed=seed, device=str(x.device))
    if x.shape[1] > 1:  # orthogonal to x's, so that the cosine of a pair is what it is set to
        other = F.normalize(other - (other * wide).sum(1, keepdim=True) * wide, dim=1)
    cosine = wide.new_full((len(x), 1), contested_cosine(x.shape[0], x.shape[1], scale))
    for _ in range(5):  # the others' weight hardly depends on the cosines: this settles within a few percent
        y = cosine * wide + (1 - cosine**2).sqrt() * other
        weight = 0.5 * (_log_sum_exp_of_others(wide, y, scale) + _log_sum_exp_of_others(y, wide, scale))
        cosine = (weight / scale).clamp(-0.9, 0.9)[:, None]
    return (cosine * wide + (1 - cosine**2).sqrt() * other).to(x.dtype)


def _log_sum_exp_of_others(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """(N,) log sum over j != i of exp(scale x_i . y_j), some rows at a time."""
    parts = []
    for start in range(0, len(x), 1024):
        z = scale * x[start : start + 1024] @ y.T
        z.diagonal(start).fill_(-torch.inf)
        parts.append(z.logsumexp(1))
    return torch.cat(parts)


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
    rows, columns = _matrices(target, x, y, scale, allowed)
    return DenseTarget(rows, columns, allowed, row_weight, column_weight)


def _matrices(target: Target, x: Tensor, y: Tensor, scale: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
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
        hard, soft = (_matrices(part, x, y, scale, allowed) for part in (target.hard, target.soft))
        return (
            (1 - row_alpha)[:, None] * hard[0] + row_alpha[:, None] * soft[0],
            (1 - column_alpha)[None, :] * hard[1] + column_alpha[None, :] * soft[1],
        )
    if isinstance(target, Average):
        weights = torch.tensor(target.weights or [1.0] * len(target.targets), dtype=torch.float64)
        parts = [_matrices(part, x, y, scale, allowed) for part in target.targets]
        shares = (weights / weights.sum()).tolist()
        return (
            sum((share * part[0] for share, part in zip(shares, parts, strict=True)), torch.zeros_like(parts[0][0])),
            sum((share * part[1] for share, part in zip(shares, parts, strict=True)), torch.zeros_like(parts[0][1])),
        )
    if isinstance(target, SoftTarget):
        return _soft_matrices(target, x, y, scale, allowed)
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


def _soft_matrices(target: SoftTarget, x: Tensor, y: Tensor, scale: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(target, Teacher):
        own = torch.as_tensor(target.scale, dtype=x.dtype, device=x.device)
        t = own * target.a.to(x.dtype) @ target.b.to(x.dtype).T
    else:
        assert isinstance(target, SelfTeacher)
        own = torch.as_tensor(scale if isinstance(target.scale, str) else target.scale, dtype=x.dtype, device=x.device)
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


def dense_loss(x: Tensor, y: Tensor, scale: Tensor, target: Target | None = None) -> Tensor:
    """What softclip_loss(x, y, scale, target) must equal, computed densely in x's dtype."""
    rows, columns = dense_row_losses(x, y, scale, dense_target(target or Hard(), x, y, scale))
    return 0.5 * (rows.mean() + columns.mean())


@dataclass(frozen=True)
class Result:
    """A loss and its gradients with respect to x, y and scale."""

    loss: Tensor
    dx: Tensor
    dy: Tensor
    dscale: Tensor

    @staticmethod
    def of(function: Callable[..., Tensor], x: Tensor, y: Tensor, scale: Tensor) -> Result:
        """`function(x, y, scale)` returns the loss; the operands become fresh leaves that keep their strides."""
        leaves = [operand.detach().requires_grad_() for operand in (x, y, scale)]
        loss = function(*leaves)
        return Result(loss.detach(), *torch.autograd.grad(loss, leaves))


def _dense(target: Target | None) -> Callable[..., Tensor]:
    return lambda x, y, scale: dense_loss(x, y, scale, target)


def truth(x: Tensor, y: Tensor, scale: Tensor, target: Target | None = None) -> Result:
    """The dense loss in float64 of the operands as rounded."""
    return Result.of(
        lambda *leaves: dense_loss(leaves[0], leaves[1], leaves[2], target), x.double(), y.double(), scale.double()
    )


# How far a result may be from the exact one, relative to its largest entry: about twice to ten times what was measured
# on problems of `contested_rows` (1e-5 in float32 at scale 300, 5.7e-3 in bfloat16, where the CPU kernels round the
# probabilities, and 5e-4 in float16). float64 is held to what a logit's rounding may cost, and so is every loss.
RELATIVE = {torch.float64: 0.0, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LOSS_ROUNDINGS = 2  # of `tolerances`; measured: 0.15 in every dtype
FIELDS = ("loss", "dx", "dy", "dscale")
LARGEST_TOLERANCE = 0.05  # of the exact result's `sizes`: a comparison that allows more proves nothing


class InsensitiveError(ValueError):
    """A comparison would let through a result that is plainly wrong."""


@dataclass(frozen=True)
class Standard:
    """What a result must be (float64), and how far each of its `FIELDS` may be from it."""

    exact: Result
    allowed: dict[str, float]

    @staticmethod
    def of(x: Tensor, y: Tensor, scale: Tensor, target: Target | None = None, *, signal: bool = True) -> Standard:
        """Twice the error that dense PyTorch makes in the same dtype plus what rounding a logit may cost
        (`tolerances`), and no more than `bounds`.

        `signal=False` is for problems whose exact gradient is next to nothing by nature: pairs that have converged, a
        single row. There it is dense PyTorch's error alone that limits a result's.

        Raises:
            InsensitiveError: what would be allowed exceeds LARGEST_TOLERANCE, or without a signal is not finite.
        """
        dense, exact = Result.of(_dense(target), x, y, scale.to(x.dtype)), truth(x, y, scale, target)
        matrices = dense_target(target or Hard(), x.double(), y.double(), scale.double())
        mass = max(1.0, matrices.rows.sum(1).max().item(), matrices.columns.sum(0).max().item())
        errors, roundings = _errors(dense, exact), tolerances(exact, x, y, scale, mass)
        allowed = {name: 2 * errors[name] + roundings[name] for name in FIELDS}
        if signal:
            own = bounds(exact, x, y, scale, mass)
            # Where dense PyTorch overflows in 16 bits its error is no limit.
            allowed = {name: min(own[name], allowed[name]) if allowed[name] >= 0 else own[name] for name in FIELDS}
            check_sensitive(allowed, exact, x, scale)
        elif not all(map(math.isfinite, allowed.values())):
            raise InsensitiveError(f"dense PyTorch overflows in {x.dtype}, and nothing else limits an error here")
        return Standard(exact, allowed)

    def check(self, result: Result) -> None:
        """Raises AssertionError where a field of `result` is further from the exact one than allowed, or not finite
        where that is."""
        for name, error in _errors(result, self.exact).items():
            if not error <= self.allowed[name]:
                raise AssertionError(f"{name}: error {error:.3e} exceeds the allowed {self.allowed[name]:.3e}")


def assert_as_accurate_as_dense(
    fused: Result, x: Tensor, y: Tensor, scale: Tensor, target: Target | None = None, *, signal: bool = True
) -> None:
    """`Standard.of(...).check(fused)`."""
    Standard.of(x, y, scale, target, signal=signal).check(fused)


def _errors(result: Result, exact: Result) -> dict[str, float]:
    """The largest error of each field."""
    return {
        name: (getattr(result, name).double() - getattr(exact, name).double()).abs().max().item() for name in FIELDS
    }


def sizes(exact: Result, x: Tensor, scale: Tensor) -> dict[str, float]:
    """The largest entry of each field; of dscale, which sums one product a row, <x_i, dx_i> / scale, and may cancel,
    also the root of the sum of these products' squares, if that is larger."""
    products = (x.double().norm(dim=1) * exact.dx.double().norm(dim=1)).norm().item() / scale.item()
    found = {name: getattr(exact, name).abs().max().item() for name in FIELDS}
    return found | {"dscale": max(found["dscale"], products)}


def bounds(exact: Result, x: Tensor, y: Tensor, scale: Tensor, mass: float = 1.0) -> dict[str, float]:
    """How far each field may be from the exact one, whatever dense PyTorch makes of it: RELATIVE of its size, but not
    less than the rounding of a logit (`tolerances`); of the loss only that."""
    roundings, relative = tolerances(exact, x, y, scale, mass), RELATIVE[x.dtype]
    own = {name: max(relative * size, roundings[name]) for name, size in sizes(exact, x, scale).items()}
    return own | {"loss": LOSS_ROUNDINGS * roundings["loss"]}


def check_sensitive(allowed: dict[str, float], exact: Result, x: Tensor, scale: Tensor) -> None:
    """Raises InsensitiveError where an error of more than LARGEST_TOLERANCE of a field's size is allowed."""
    for name, size in sizes(exact, x, scale).items():
        if not allowed[name] <= LARGEST_TOLERANCE * size:
            raise InsensitiveError(
                f"{name}: an error of {allowed[name]:.1e} would be allowed where the exact one's size is {size:.1e}, "
                f"more than {LARGEST_TOLERANCE:.0%} of it; use pairs that carry a signal (contested_rows), or say "
                "signal=False where there is none by nature"
            )


def tolerances(exact: Result, x: Tensor, y: Tensor, scale: Tensor, mass: float = 1.0) -> dict[str, float]:
    """The atol of each result. A logit carries a rounding of eps * |z| in the accumulation dtype; the loss takes it on
    directly, a gradient entry in proportion to its natural size (scale / rows), as it does that of its probability
    (eps), plus the result's own rounding. `mass`, at least 1, is the largest mass of a row's or column's target, by
    which its log-sum-exp and its probabilities are multiplied."""
    eps = torch.finfo(accumulation_dtype(x.dtype)).eps
    x_norm, y_norm = (tensor.double().norm(dim=1).max().item() for tensor in (x, y))
    largest = scale.abs().item() * x_norm * y_norm
    per_row = 1 / min(len(x), len(y))

    def rounding(result: Tensor, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps * result.abs().max().item()

    return {
        "loss": 8 * eps * (mass * largest + exact.loss.abs().item()),
        "dx": 4 * eps * mass * (1 + largest) * scale.item() * y_norm * per_row + rounding(exact.dx, x.dtype),
        "dy": 4 * eps * mass * (1 + largest) * scale.item() * x_norm * per_row + rounding(exact.dy, y.dtype),
        "dscale": 4 * eps * (mass * largest * x_norm * y_norm + exact.dscale.abs().item())
        + rounding(exact.dscale, scale.dtype),
    }
