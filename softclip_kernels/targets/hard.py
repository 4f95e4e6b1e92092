"""Hard targets: the diagonal, labels, groups, label smoothing, or a given matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, guard_rails
from .base import Target
from .context import Context
from .lowered import LoweredTarget
from .terms import DenseTerm, GroupTerm, IndexTerm


@dataclass(frozen=True)
class Hard(Target):
    """One positive for each row, or several.

        F.cross_entropy(z, labels, label_smoothing=smoothing)      # and the same matrix, transposed, for columns

    labels     None: row i matches column i (N == M). (N,) integers: row i matches column labels[i]; rows may share one.
               Over ranks a label is the number of a column of the global batch, unless `local`
    smoothing  share of every row's mass spread evenly over the columns (over rows for the columns), in [0, 1]
    groups     ids (row (N,), column (M,)) instead of labels: row i matches every column of equal id, equally.
               A row or column that matches nothing contributes no hard loss
    local      over ranks, labels count this rank's own columns from 0
    """

    labels: Tensor | None = None
    smoothing: float = 0.0
    groups: tuple[Tensor, Tensor] | None = None
    local: bool = False

    def __post_init__(self) -> None:
        checks.number_in("smoothing", self.smoothing, 0.0, 1.0)
        if self.labels is not None and self.groups is not None:
            raise ValueError("give labels or groups, not both: labels name columns, groups name classes")
        if self.local and self.labels is None:
            raise ValueError("local=True says how labels count columns; give labels, or leave it out")

    @property
    def is_diagonal(self) -> bool:
        """Row i matches column i, and nothing else: what it lowers to depends on the batch's shape alone."""
        return self.labels is None and self.groups is None and self.smoothing == 0.0

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
            index = context.row_numbers()
            inverse = index if layout.exchange is None else None  # else it would have to travel with the columns
            aligned = layout.aligned
            return LoweredTarget(positive=IndexTerm(1.0, 1.0, index, own=aligned, diagonal=aligned, inverse=inverse))
        checks.same_device("labels", self.labels, layout.device)
        checks.indices("labels", self.labels, layout.n_local, layout.m_local if self.local else layout.m)
        index = self.labels.to(torch.int64)
        if self.local:
            return LoweredTarget(positive=IndexTerm(1.0, 1.0, index + layout.column_start, own=True))
        guard_rails.labels(self.labels, layout)
        return LoweredTarget(positive=IndexTerm(1.0, 1.0, index))

    def _grouped(self, context: Context) -> LoweredTarget:
        assert self.groups is not None
        row_ids, column_ids = context.identifiers("groups", *self.groups)
        return LoweredTarget(linear=(GroupTerm(1.0, 1.0, row_ids, column_ids),))


def _uniform(context: Context) -> LoweredTarget:
    """Equal mass on everything that a row or column may see."""
    row_ids, column_ids = context.segments or (
        torch.zeros(len(context.x), dtype=torch.int64, device=context.layout.device),
        torch.zeros(len(context.y), dtype=torch.int64, device=context.layout.device),
    )
    return LoweredTarget(linear=(GroupTerm(1.0, 1.0, row_ids, column_ids),))


@dataclass(frozen=True)
class Dense(Target):
    """A target matrix given in full, for small cases: rows (N, M), entries at least 0, any mass.

    -(rows * z.log_softmax(1)).sum(1)          # and rows.T for the columns, unless `columns` (N, M) is given
    """

    rows: Tensor
    columns: Tensor | None = None

    def lower(self, context: Context) -> LoweredTarget:
        if self.columns is None:
            return LoweredTarget(linear=(self._term(context, "rows", self.rows, 1.0, 1.0),))
        return LoweredTarget(
            linear=(
                self._term(context, "rows", self.rows, 1.0, 0.0),
                self._term(context, "columns", self.columns, 0.0, 1.0),
            )
        )

    @staticmethod
    def _term(context: Context, name: str, matrix: Tensor, rows: float, columns: float) -> DenseTerm:
        layout = context.layout
        # Number by number: where a compiler traces, one of them may be a symbol, which no tuple is found to hold.
        rows_fit = matrix.dim() == 2 and (len(matrix) == layout.n_local or len(matrix) == layout.n)
        if not rows_fit or matrix.shape[1] != layout.m:
            raise ValueError(f"Dense {name} has shape {tuple(matrix.shape)}; allowed: {(layout.n_local, layout.m)}")
        checks.same_device(f"Dense {name}", matrix, layout.device)
        checks.non_negative(f"Dense {name}", matrix)
        matrix = matrix.detach().to(layout.dtype)
        return DenseTerm(rows, columns, matrix if len(matrix) == layout.n_local else matrix[layout.own_rows])
