"""What each row should match: hard labels, and mixtures of targets (teachers are in teachers.py). Each class lowers
itself to terms; a new target is one such class.

A target describes a whole (global) batch of N rows (images) and M columns (texts) in both directions: image→text, a
distribution over columns for every row, and text→image, a distribution over rows for every column. Over ranks,
per-row and per-column tensors may be given for this rank's share or for the global batch; labels and teachers are this
rank's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checks
from .layout import Layout
from .lowering import DenseTerm, GroupTerm, IndexTerm, LoweredTarget

Coefficients = float | Tensor | tuple[Tensor | float, Tensor | float]


@dataclass(frozen=True)
class Context:
    """What lowering may look at, detached: x (N, D) and y (M, D), this rank's rows and columns, scale 0-d."""

    x: Tensor
    y: Tensor
    scale: Tensor
    layout: Layout
    backend: str = "auto"
    segments: tuple[Tensor, Tensor] | None = None

    def ones(self) -> tuple[Tensor, Tensor]:
        dtype = self.layout.dtype
        return self.x.new_ones(len(self.x), dtype=dtype), self.x.new_ones(len(self.y), dtype=dtype)

    def row_vector(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of a per-row tensor given for its own rows or for all."""
        checks.vector(name, value, (self.layout.n_local, self.layout.n))
        value = value.detach().to(self.layout.device)
        return value if len(value) == self.layout.n_local else value[self.layout.own_rows]

    def column_vector(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of a per-column tensor given for its own columns or for all."""
        checks.vector(name, value, (self.layout.m_local, self.layout.m))
        value = value.detach().to(self.layout.device)
        return value if len(value) == self.layout.m_local else value[self.layout.own_columns]

    def identifiers(self, name: str, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of ids of rows and columns, int64."""
        for side, value in (("rows", rows), ("columns", columns)):
            checks.identifiers(f"{name} of the {side}", value)
        own_rows = self.row_vector(f"{name} of the rows", rows)
        return own_rows.long(), self.column_vector(f"{name} of the columns", columns).long()

    def coefficients(self, name: str, value: Coefficients) -> tuple[Tensor | float, Tensor | float]:
        """A number for all, one tensor for the pairs (N == M), or a (per-row, per-column) couple."""
        if isinstance(value, Tensor) and value.dim():
            checks.square(f"one tensor as {name}", self.layout.n, self.layout.m)
        rows, columns = value if isinstance(value, tuple) else (value, value)
        if isinstance(rows, Tensor):
            rows = self._number_or(self.row_vector, f"{name} of the rows", rows)
        if isinstance(columns, Tensor):
            columns = self._number_or(self.column_vector, f"{name} of the columns", columns)
        return rows, columns

    def _number_or(self, vector: Callable[[str, Tensor], Tensor], name: str, value: Tensor) -> Tensor:
        own = value.detach().to(self.layout.device) if value.dim() == 0 else vector(name, value)
        return own.to(self.layout.dtype)


class Target(ABC):
    @abstractmethod
    def lower(self, context: Context) -> LoweredTarget:
        """This target as terms; raises on values that do not fit the batch. Communicates nothing: see Term.complete."""


def check_target(name: str, value: Any) -> None:
    if not isinstance(value, Target):
        hint = "; call its at(step, n)" if hasattr(value, "at") else ""
        raise TypeError(f"{name} must be a target, such as Hard() or Mix(...), not {type(value).__name__}{hint}")


def _check_coefficients(name: str, value: Coefficients, check: Callable[[str, Any], None]) -> None:
    for one in value if isinstance(value, tuple) else (value,):
        check(name, one)


@dataclass(frozen=True)
class Hard(Target):
    """One positive for each row, or several.

        F.cross_entropy(z, labels, label_smoothing=smoothing)      # and the same matrix, transposed, for columns

    labels     None: row i matches column i (N == M). (N,) integers: row i matches column labels[i]; rows may share one
    smoothing  share of every row's mass spread evenly over the columns (over rows for the columns), in [0, 1]
    groups     ids (row (N,), column (M,)) instead of labels: row i matches every column of equal id, equally.
               A row or column that matches nothing contributes no hard loss
    """

    labels: Tensor | None = None
    smoothing: float = 0.0
    groups: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        checks.number_in("smoothing", self.smoothing, 0.0, 1.0)
        if self.labels is not None and self.groups is not None:
            raise ValueError("give labels or groups, not both: labels name columns, groups name classes")

    def lower(self, context: Context) -> LoweredTarget:
        hard = self._grouped(context) if self.groups is not None else self._indexed(context)
        if self.smoothing == 0.0:
            return hard
        return hard.scaled(1 - self.smoothing, 1 - self.smoothing).plus(
            _uniform(context).scaled(self.smoothing, self.smoothing)
        )

    def _indexed(self, context: Context) -> LoweredTarget:
        layout = context.layout
        if self.labels is None:
            checks.square("the diagonal target Hard()", layout.n, layout.m)
            index = torch.arange(layout.n_local, device=layout.device) + layout.row_start
            return LoweredTarget(hard=(IndexTerm(*context.ones(), index, layout.aligned),))
        checks.same_device("labels", self.labels, layout.device)
        checks.indices("labels", self.labels, layout.n_local, layout.m)
        return LoweredTarget(hard=(IndexTerm(*context.ones(), self.labels.to(torch.int64)),))

    def _grouped(self, context: Context) -> LoweredTarget:
        assert self.groups is not None
        row_ids, column_ids = context.identifiers("groups", *self.groups)
        return LoweredTarget(hard=(GroupTerm(*context.ones(), row_ids, column_ids),))


def _uniform(context: Context) -> LoweredTarget:
    """Equal mass on everything that a row or column may see."""
    row_ids, column_ids = context.segments or (
        torch.zeros(len(context.x), dtype=torch.int64, device=context.layout.device),
        torch.zeros(len(context.y), dtype=torch.int64, device=context.layout.device),
    )
    return LoweredTarget(hard=(GroupTerm(*context.ones(), row_ids, column_ids),))


@dataclass(frozen=True)
class Dense(Target):
    """A target matrix given in full, for small cases: rows (N, M), entries at least 0, any mass.

    -(rows * z.log_softmax(1)).sum(1)          # and rows.T for the columns, unless `columns` (N, M) is given
    """

    rows: Tensor
    columns: Tensor | None = None

    def lower(self, context: Context) -> LoweredTarget:
        first, second = context.ones()
        if self.columns is None:
            return LoweredTarget(hard=(self._term(context, "rows", self.rows, first, second),))
        return LoweredTarget(
            hard=(
                self._term(context, "rows", self.rows, first, torch.zeros_like(second)),
                self._term(context, "columns", self.columns, torch.zeros_like(first), second),
            )
        )

    @staticmethod
    def _term(context: Context, name: str, matrix: Tensor, rows: Tensor, columns: Tensor) -> DenseTerm:
        layout = context.layout
        if matrix.shape not in ((layout.n_local, layout.m), (layout.n, layout.m)):
            raise ValueError(f"Dense {name} has shape {tuple(matrix.shape)}; allowed: {(layout.n_local, layout.m)}")
        checks.same_device(f"Dense {name}", matrix, layout.device)
        checks.non_negative(f"Dense {name}", matrix)
        matrix = matrix.detach().to(layout.dtype)
        return DenseTerm(rows, columns, matrix if len(matrix) == layout.n_local else matrix[layout.own_rows])


@dataclass(frozen=True)
class Mix(Target):
    """`(1 - alpha) * hard + alpha * soft`, row by row and column by column; hard and soft may be any targets.

    alpha in [0, 1]: a number; a tensor with a value for each pair (N,), N == M; or a couple (rows (N,), columns (M,)).
    A 0/1 alpha partitions the batch, a constant blends.
    """

    hard: Target
    soft: Target
    alpha: Coefficients

    def __post_init__(self) -> None:
        check_target("hard", self.hard)
        check_target("soft", self.soft)
        _check_coefficients("alpha", self.alpha, checks.probabilities)

    def lower(self, context: Context) -> LoweredTarget:
        rows, columns = context.coefficients("alpha", self.alpha)
        hard = self.hard.lower(context).scaled(1 - rows, 1 - columns)
        return hard.plus(self.soft.lower(context).scaled(rows, columns))


@dataclass(frozen=True)
class Average(Target):
    """The weighted mean of several targets, for example teachers. Weights, equal by default, are normalised."""

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
        _check_coefficients("weights", self.weights, checks.non_negative)

    def lower(self, context: Context) -> LoweredTarget:
        rows, columns = context.coefficients("weights", self.weights)
        one_row, one_column = context.ones()
        return self.target.lower(context).weighted(one_row * rows, one_column * columns)


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
