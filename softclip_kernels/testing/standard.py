"""The rule by which a result counts as correct, against the dense loss in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..losses.softmax import softclip_loss
from ..problem import accumulation_dtype
from ..targets.base import Target
from ..targets.hard import Hard
from .dense import dense_loss, dense_target


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

    @staticmethod
    def of_loss(x: Tensor, y: Tensor, scale: Tensor, target: Target | None = None, **options: Any) -> Result:
        """Of softclip_loss with this target and these options."""
        return Result.of(lambda x, y, scale: softclip_loss(x, y, scale, target, **options), x, y, scale)

    def differing(self, other: Result) -> list[str]:
        """The fields whose bits differ."""
        return [name for name in FIELDS if not torch.equal(getattr(self, name), getattr(other, name))]


def _dense(target: Target | None, direction: str = "both") -> Callable[..., Tensor]:
    return lambda x, y, scale: dense_loss(x, y, scale, target, direction)


def truth(x: Tensor, y: Tensor, scale: Tensor, target: Target | None = None, **dense_options: str) -> Result:
    """The dense loss, with its options, in float64 of the operands as rounded."""
    return Result.of(_dense(target, **dense_options), x.double(), y.double(), scale.double())


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
    def of(
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        target: Target | None = None,
        *,
        signal: bool = True,
        direction: str = "both",
    ) -> Standard:
        """Twice the error that dense PyTorch makes in the same dtype plus what rounding a logit may cost
        (`tolerances`), and no more than `bounds`. Of dscale, a single number whose error may be next to nothing by
        chance, dense PyTorch's counts as no less than what the errors of its dx make likely.

        `signal=False` is for problems whose exact gradient is next to nothing by nature: pairs that have converged, a
        single row. There it is dense PyTorch's error alone that limits a result's.

        Raises:
            InsensitiveError: what would be allowed exceeds LARGEST_TOLERANCE, or without a signal is not finite.
        """
        dense = Result.of(_dense(target, direction), x, y, scale.to(x.dtype))
        exact = truth(x, y, scale, target, direction=direction)
        matrices = dense_target(target or Hard(), x.double(), y.double(), scale.double())
        mass = max(1.0, matrices.rows.sum(1).max().item(), matrices.columns.sum(0).max().item())
        errors, roundings = _errors(dense, exact), tolerances(exact, x, y, scale, mass)
        errors["dscale"] = max(errors["dscale"], _expected_error_of_dscale(dense, exact, x, scale))
        allowed = {name: 2 * errors[name] + roundings[name] for name in FIELDS}
        if signal:
            own = bounds(exact, roundings, x, scale)
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
    fused: Result, x: Tensor, y: Tensor, scale: Tensor, target: Target | None = None, **options: Any
) -> None:
    """`Standard.of(...).check(fused)`, with its options."""
    Standard.of(x, y, scale, target, **options).check(fused)


def _errors(result: Result, exact: Result) -> dict[str, float]:
    """The largest error of each field."""
    return {
        name: (getattr(result, name).double() - getattr(exact, name).double()).abs().max().item() for name in FIELDS
    }


def _expected_error_of_dscale(result: Result, exact: Result, x: Tensor, scale: Tensor) -> float:
    """dscale sums one product a row, <x_i, dx_i> / scale: the root of the sum of squares of what the errors of dx make
    of these, as if they were independent."""
    products = (x.double() * (result.dx.double() - exact.dx)).sum(1)
    return products.norm().item() / abs(scale.item())


def sizes(exact: Result, x: Tensor, scale: Tensor) -> dict[str, float]:
    """The largest entry of each field; of dscale, which sums one product a row, <x_i, dx_i> / scale, and may cancel,
    also the root of the sum of these products' squares, if that is larger."""
    products = (x.double().norm(dim=1) * exact.dx.double().norm(dim=1)).norm().item() / scale.item()
    found = {name: getattr(exact, name).abs().max().item() for name in FIELDS}
    return found | {"dscale": max(found["dscale"], products)}


def bounds(exact: Result, roundings: dict[str, float], x: Tensor, scale: Tensor) -> dict[str, float]:
    """How far each field may be from the exact one, whatever dense PyTorch makes of it: RELATIVE of its size, but not
    less than the rounding of a logit (`roundings`, from `tolerances`); of the loss only that."""
    relative = RELATIVE[x.dtype]
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
