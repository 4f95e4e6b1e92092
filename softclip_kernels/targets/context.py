"""What a target may look at while it is lowered to terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..distributed.exchange import Layout
from ..linear_form import Coefficient

Coefficients = Coefficient | tuple[Coefficient, Coefficient]


@dataclass(frozen=True)
class Context:
    """What lowering may look at: x (N, D) and y (M, D), this rank's rows and columns, and scale, 0-d; the properties
    are detached. `direction`: whose losses are asked for, as softclip_loss takes it. `kept`: what later calls of the
    same shapes may take again, None where nothing is kept."""

    operands: tuple[Tensor, Tensor, Tensor]  # x, y, scale
    layout: Layout
    backend: str = "auto"
    direction: str = "both"
    segments: tuple[Tensor, Tensor] | None = None
    kept: dict[str, Tensor] | None = None

    @property
    def x(self) -> Tensor:
        return self.operands[0].detach()

    @property
    def y(self) -> Tensor:
        return self.operands[1].detach()

    @property
    def scale(self) -> Tensor:
        return self.operands[2].detach()

    def row_numbers(self) -> Tensor:
        """Of this rank's rows among all, (n_local,) int64, never to be written to."""
        kept = {} if self.kept is None else self.kept
        if "row numbers" not in kept:
            start, length = self.layout.row_start, self.layout.n_local
            kept["row numbers"] = torch.arange(start, start + length, device=self.layout.device)
        return kept["row numbers"]

    def row_vector(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of a per-row tensor given for its own rows or for all."""
        checks.vector(name, value, (self.layout.n_local, self.layout.n))
        value = self._constant(value)
        return value if len(value) == self.layout.n_local else value[self.layout.own_rows]

    def column_vector(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of a per-column tensor given for its own columns or for all."""
        checks.vector(name, value, (self.layout.m_local, self.layout.m))
        value = self._constant(value)
        return value if len(value) == self.layout.m_local else value[self.layout.own_columns]

    def identifiers(self, name: str, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of ids of rows and columns, int64."""
        for side, value in (("rows", rows), ("columns", columns)):
            checks.identifiers(f"{name} of the {side}", value)
        own_rows = self.row_vector(f"{name} of the rows", rows)
        return own_rows.long(), self.column_vector(f"{name} of the columns", columns).long()

    def coefficients(self, name: str, value: Coefficients) -> tuple[Coefficient, Coefficient]:
        """A number for all, one tensor for the pairs (N == M), or a (per-row, per-column) pair."""
        if isinstance(value, Tensor) and value.dim():
            checks.square(f"one tensor as {name}", self.layout.n, self.layout.m)
        rows, columns = value if isinstance(value, tuple) else (value, value)
        of_rows = self._number_or(self.row_vector, f"{name} of the rows", rows)
        if rows is columns and self.layout.exchange is None and self.layout.n == self.layout.m:
            return of_rows, of_rows
        return of_rows, self._number_or(self.column_vector, f"{name} of the columns", columns)

    def _number_or(self, vector: Callable[[str, Tensor], Tensor], name: str, value: Tensor | float) -> Coefficient:
        if not isinstance(value, Tensor):
            return float(value)
        own = self._constant(value) if value.dim() == 0 else vector(name, value)
        return own if own.dtype == self.layout.dtype else own.to(self.layout.dtype)

    def _constant(self, value: Tensor) -> Tensor:
        value = value.detach() if value.requires_grad else value
        return value if value.device == self.layout.device else value.to(self.layout.device)
