"""Soft targets: the similarity distributions of teachers, recomputed in the kernels and never stored."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import checks
from ..problem import Source, TeacherOperand
from .base import Target
from .context import Context
from .lowered import LoweredTarget
from .terms import ColumnNormalizedTerm, SinkhornTerm, TeacherTerm


@dataclass(frozen=True)
class Sinkhorn:
    """Normalise rows and columns in turn (an optimal-transport plan), ending with the rows; after Cuturi, NIPS 2013."""

    iterations: int = 5

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1")


@dataclass(frozen=True)
class Potentials:
    """Given potentials: the target is exp(t_ij + row_i + column_j), of whatever mass. -inf excludes. (N,) and (M,)."""

    row: Tensor
    column: Tensor

    def __post_init__(self) -> None:
        for name, value in (("the row potential", self.row), ("the column potential", self.column)):
            checks.tensor(name, value)
            checks.potential(name, value)


Normalise = str | Sinkhorn | Potentials


@dataclass(frozen=True)
class Ratio:
    """A teacher's logit scale as a multiple of the student's, which it follows while that is learned: with 2 the
    teacher's distribution is twice as sharp as the student's, at a scale of 14 as at one of 100."""

    value: float

    def __post_init__(self) -> None:
        checks.number_in("ratio", self.value, torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)


Scale = Tensor | float | str | Ratio


def check_scale(name: str, scale: Scale, allowed: tuple[str, ...] = ()) -> None:
    """A Ratio, or what checks.teacher_scale allows."""
    if not isinstance(scale, Ratio):
        checks.teacher_scale(name, scale, allowed)


@dataclass(frozen=True)
class SoftTarget(Target):
    """What teachers share: logits t, which `normalise` turns into a target for each direction. Never differentiated.

    normalise "row"       each direction's own softmax: over columns for rows, over rows for columns
              "column"    the other direction's softmax, whose mass per row is not 1
              "sinkhorn"  both, alternating, or Sinkhorn(iterations)
              Potentials  given
    """

    normalise: Normalise = field(default="row", kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.normalise, str):
            checks.one_of("normalise", self.normalise, ("row", "column", "sinkhorn"))

    @abstractmethod
    def operand(self, context: Context) -> TeacherOperand:
        """The teacher's logits, without biases."""

    def lower(self, context: Context) -> LoweredTarget:
        operand = self.operand(context)
        if isinstance(self.normalise, Potentials):
            row = context.row_vector("the row potential", self.normalise.row).to(context.layout.dtype)
            column = context.column_vector("the column potential", self.normalise.column).to(context.layout.dtype)
            return LoweredTarget(teachers=(TeacherTerm(1.0, 1.0, operand, row, column).with_biases(row, column),))
        if self.normalise == "row":
            return LoweredTarget(teachers=(TeacherTerm(1.0, 1.0, operand),))
        if self.normalise == "column":
            return LoweredTarget(teachers=(ColumnNormalizedTerm(1.0, 1.0, operand),))
        sinkhorn = self.normalise if isinstance(self.normalise, Sinkhorn) else Sinkhorn()
        return LoweredTarget(teachers=(SinkhornTerm(1.0, 1.0, operand, iterations=sinkhorn.iterations),))


@dataclass(frozen=True)
class Teacher(SoftTarget):
    """The similarity distribution of other embeddings: an EMA or frozen model, another modality's encoder.

        t = scale * a @ b.T;    rows: t.softmax(1)    columns: t.softmax(0)

    a (N, E) for the rows, b (M, E) for the columns, any width E, used as given (normalize them as the teacher was
    trained); scale: the teacher's logit scale, already exponentiated, or a Ratio to the student's.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | float | Ratio

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("teacher scale", self.scale)

    def transposed(self) -> Teacher:
        """Row i is taught by the teacher's text→image distribution of pair i, and the other way round."""
        return replace(self, a=self.b, b=self.a)

    def operand(self, context: Context) -> TeacherOperand:
        layout = context.layout
        checks.embeddings(self.a, self.b, ("teacher a", "teacher b"))
        checks.same_device("teacher a", self.a, layout.device)
        for name, length, expected in (("a", len(self.a), layout.n_local), ("b", len(self.b), layout.m_local)):
            if length != expected:
                raise ValueError(f"teacher {name} has {length} rows; allowed: {expected}, one for each embedding")
        a, b = self.a.detach(), self.b.detach()
        if layout.dtype == torch.float64:  # the teacher's own passes accumulate in the dtype of its embeddings
            a, b = a.double(), b.double()
        if isinstance(self.scale, Ratio):
            return TeacherOperand(Source.EMBEDDINGS, context.scale * self.scale.value, a, b)
        return TeacherOperand(Source.EMBEDDINGS, _detached_scale(self.scale, context), a, b)


@dataclass(frozen=True)
class SelfTeacher(SoftTarget):
    """The model's own similarity distribution of this batch, as a constant.

    scale  "tied": the student's logit scale; a Ratio to it; or the teacher's own, already exponentiated
    swap   "none"    row i is taught by its own image→text distribution: with a tied scale it has zero gradient
           "paired"  row i is taught by the text→image distribution of pair i, and the other way round (N == M)
    """

    scale: Scale = "tied"
    swap: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("swap", self.swap, ("none", "paired"))
        check_scale("scale", self.scale, ("tied",))

    def operand(self, context: Context) -> TeacherOperand:
        ratio = None
        if isinstance(self.scale, Ratio):
            ratio = torch.full_like(context.scale, self.scale.value)
        elif not isinstance(self.scale, str):
            ratio = _detached_scale(self.scale, context) / context.scale
        if self.swap == "none":
            return TeacherOperand(Source.LOGITS, ratio)
        layout = context.layout
        if layout.exchange is None:
            checks.square('swap="paired"', layout.n_local, layout.m_local)
            return TeacherOperand(Source.TRANSPOSED, ratio)
        if not layout.aligned:
            raise ValueError(
                f'swap="paired" needs both sides of a pair on one rank; the ranks have {layout.row_counts} rows and '
                f"{layout.column_counts} columns"
            )
        scale = context.scale if ratio is None else context.scale * ratio
        return TeacherOperand(Source.EMBEDDINGS, scale, context.y, context.x)


def _detached_scale(scale: Tensor | float, context: Context) -> Tensor:
    """A teacher's scale as a 0-d tensor of the accumulation dtype, without gradient."""
    if not isinstance(scale, Tensor):
        return torch.full((), scale, dtype=context.layout.dtype, device=context.layout.device)
    checks.logit_scale(scale, context.layout.device, "teacher scale")
    return scale.detach().to(context.layout.device, context.layout.dtype).reshape(())
