"""Targets made of targets: mixtures, means, weights, segments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .. import checks
from .base import Target, check_coefficients, check_target
from .context import Coefficients, Context
from .lowered import LoweredTarget


@dataclass(frozen=True)
class Mix(Target):
    """`(1 - alpha) * hard + alpha * soft`, row by row and column by column; hard and soft may be any targets.

    alpha in [0, 1]: a number; a tensor with a value for each pair (N,), N == M; or a pair (rows (N,), columns (M,)).
    A 0/1 alpha partitions the batch, a constant blends.
    """

    hard: Target
    soft: Target
    alpha: Coefficients

    def __post_init__(self) -> None:
        check_target("hard", self.hard)
        check_target("soft", self.soft)
        check_coefficients("alpha", self.alpha, checks.probabilities)

    def lower(self, context: Context) -> LoweredTarget:
        rows, columns = context.coefficients("alpha", self.alpha)
        of_hard = 1 - rows
        hard = self.hard.lower(context).scaled(of_hard, of_hard if columns is rows else 1 - columns)
        return hard.plus(self.soft.lower(context).scaled(rows, columns))


@dataclass(frozen=True)
class Average(Target):
    """The weighted mean of several targets, for example teachers. Weights, equal by default, are normalized."""

    targets: Sequence[Target]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("Average needs at least one target")
        for target in self.targets:
            check_target("every one of targets", target)
        if self.weights is not None and not (
            len(self.weights) == len(self.targets) and min(self.weights) >= 0 and 0 < sum(self.weights) < math.inf
        ):
            raise ValueError(
                f"weights={list(self.weights)} must be {len(self.targets)} finite numbers, none negative, not all zero"
            )

    def lower(self, context: Context) -> LoweredTarget:
        weights = self.weights or [1.0] * len(self.targets)
        lowered = LoweredTarget()
        for target, weight in zip(self.targets, weights, strict=True):
            share = weight / sum(weights)
            lowered = lowered.plus(target.lower(context).scaled(share, share))
        return lowered


@dataclass(frozen=True)
class Weighted(Target):
    """Loss weights: row i's loss counts rows[i] times, column j's columns[j] times (omega; not renormalised)."""

    target: Target
    weights: Coefficients

    def __post_init__(self) -> None:
        check_target("target", self.target)
        check_coefficients("weights", self.weights, checks.non_negative)

    def lower(self, context: Context) -> LoweredTarget:
        return self.target.lower(context).weighted(*context.coefficients("weights", self.weights))


@dataclass(frozen=True)
class Blocks(Target):
    """Rows see only columns of the same segment: everything else leaves both softmaxes, every teacher and every target.

    rows (N,), columns (M,) integer segment ids; a row's positive must be of its segment. A row or column that sees
    nothing contributes nothing.
    """

    target: Target
    rows: Tensor
    columns: Tensor

    def __post_init__(self) -> None:
        check_target("target", self.target)

    def lower(self, context: Context) -> LoweredTarget:
        segments = context.identifiers("segments", self.rows, self.columns)
        lowered = self.target.lower(replace(context, segments=segments))
        if lowered.segments is not None:
            raise ValueError("Blocks inside Blocks: give one Blocks whose segments combine both")
        return replace(lowered, segments=segments)


@dataclass(frozen=True)
class ForBatch(Target):
    """A target that was made for a batch of n pairs: over ranks, of the global batch. Any other batch is refused."""

    target: Target
    n: int

    def lower(self, context: Context) -> LoweredTarget:
        if (context.layout.n, context.layout.m) != (self.n, self.n):
            raise ValueError(
                f"the target was made for n={self.n} pairs, but the batch has {context.layout.n} rows and "
                f"{context.layout.m} columns; over ranks n is that of the global batch"
            )
        return self.target.lower(context)
