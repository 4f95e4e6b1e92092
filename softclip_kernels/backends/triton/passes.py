"""From a Problem to the kernels' operands: which mode a teacher runs in, the common references, strides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...problem import PROBLEM_TENSORS, Problem, Source, TeacherOperand
from .call import strides
from .scalars import Scalars
from .tiles import EMBEDDINGS, LOGITS, NONE, TRANSPOSED

MODES = {
    "none": NONE.value,
    "embeddings": EMBEDDINGS.value,
    "logits": LOGITS.value,
    "transposed": TRANSPOSED.value,
}


@dataclass(frozen=True)
class Pass:
    """One launch's view of a problem: the student (when `student`) and at most one teacher.

    mode     one of MODES: where the teacher's logits come from
    tied     the teacher's logits are the student's (the mirror's, when TRANSPOSED) times exactly 1
    weights  `exp(bias - largest bias)`, None where there is no bias
    scalars  fp32, as tiles.py lists them
    """

    problem: Problem
    student: bool
    mode: int
    tied: bool
    teacher_x: Tensor | None
    teacher_y: Tensor | None
    row_bias: Tensor | None
    column_bias: Tensor | None
    row_weight: Tensor | None
    column_weight: Tensor | None
    scalars: Tensor

    @property
    def mirrored(self) -> bool:
        """Tiles (I, J) and (J, I) are worked on together."""
        return self.mode == TRANSPOSED.value

    @property
    def mode_name(self) -> str:
        """A key of MODES."""
        return next(name for name, value in MODES.items() if value == self.mode)

    @property
    def taught(self) -> bool:
        return self.mode != NONE.value

    @property
    def ranked(self) -> bool:
        """Ranks are counted in this pass."""
        return self.student and self.problem.row_threshold is not None

    @property
    def itemsize(self) -> int:
        return max(t.element_size() for t in (self.problem.x, self.teacher_x) if t is not None)

    @property
    def product_width(self) -> int:
        """The width of all matrix products that an entry takes."""
        own = self.problem.x.shape[1] * ((self.student or self.mode == LOGITS.value) + self.mirrored)
        return own if self.teacher_x is None else own + self.teacher_x.shape[1]

    def signature(self) -> tuple[Any, ...]:
        """What decides, beside the machine, which tile shape is the fastest."""
        p = self.problem
        teacher = () if self.teacher_x is None else (self.teacher_x.dtype, self.teacher_x.shape[1])
        vectors = (p.row_segment, p.row_threshold, self.row_bias, self.column_bias)
        return (
            f"teacher {self.mode_name}",
            *(name for name, holds in (("student", self.student), ("tied", self.tied)) if holds),
            *(
                name
                for name, vector in zip(("segments", "ranks", "row bias", "column bias"), vectors, strict=True)
                if vector is not None
            ),
            p.x.dtype,
            p.x.shape[1],
            *teacher,
        )

    def untaught(self) -> Pass:
        """The student's part alone."""
        return replace(self, mode=MODES["none"], tied=False, teacher_x=None, teacher_y=None)

    def unmirrored(self) -> Pass:
        """The same with the transposed logits as a matrix product of their own."""
        if not self.mirrored:
            return self
        p = self.problem
        return replace(self, mode=EMBEDDINGS.value, tied=False, teacher_x=p.y, teacher_y=p.x)

    def exchanged(self) -> Pass:
        """Rows and columns exchanged; for what needs neither positives nor the largest biases."""
        p = self.problem
        return replace(
            self,
            problem=replace(
                p,
                x=p.y,
                y=p.x,
                positive_column=None,
                row_segment=p.column_segment,
                column_segment=p.row_segment,
                row_threshold=p.column_threshold,
                column_threshold=p.row_threshold,
            ),
            teacher_x=self.teacher_y,
            teacher_y=self.teacher_x,
            row_bias=self.column_bias,
            column_bias=self.row_bias,
            row_weight=self.column_weight,
            column_weight=self.row_weight,
        )

    def arguments(self) -> dict[str, Any]:
        """What the kernels take of a pass; each takes a part."""
        p = self.problem
        matrices = {
            "x": p.x,
            "y": p.y,
            "teacher_x": p.x if self.teacher_x is None else self.teacher_x,
            "teacher_y": p.y if self.teacher_y is None else self.teacher_y,
        }
        return {
            **matrices,
            "width": p.x.shape[1],
            "teacher_width": matrices["teacher_x"].shape[1],
            "positive_column": p.positive_column,
            "row_segment": p.row_segment,
            "column_segment": p.column_segment,
            "row_threshold": p.row_threshold if self.ranked else None,
            "column_threshold": p.column_threshold if self.ranked else None,
            "row_bias": self.row_bias,
            "column_bias": self.column_bias,
            "row_weight": self.row_weight,
            "column_weight": self.column_weight,
            "scalars": self.scalars,
            **strides(**matrices),
        }


def passes(problem: Problem, known_bounds: Tensor | None = None) -> tuple[list[Pass], Tensor]:
    """The launches that cover a problem, of which the first holds the student and each holds one teacher; and bounds of
    the logits (1 + K,) as in Statistics, `known_bounds` where those are given."""
    problem = _with_contiguous_vectors(problem)
    scalars = Scalars(problem, known_bounds)
    launch_passes = [
        _pass(problem, k, teacher, scalars, alone=len(problem.teachers) == 1)
        for k, teacher in enumerate(problem.teachers or (None,))
    ]
    return launch_passes, scalars.bounds


def _pass(problem: Problem, k: int, teacher: TeacherOperand | None, scalars: Scalars, alone: bool) -> Pass:
    mode, tied, teacher_x, teacher_y = NONE.value, False, None, None
    row_bias = column_bias = row_weight = column_weight = top_row = top_column = None
    if teacher is not None:
        tied = teacher.scale is None
        if teacher.source == Source.EMBEDDINGS:
            mode, tied, teacher_x, teacher_y = EMBEDDINGS.value, False, teacher.x, teacher.y
        elif teacher.source == Source.LOGITS:
            mode = LOGITS.value
        elif alone:
            mode = TRANSPOSED.value
        else:  # beside other teachers the transposed logits are a product of their own
            mode, tied, teacher_x, teacher_y = EMBEDDINGS.value, False, problem.y, problem.x
        row_bias, row_weight, top_row = _centered(teacher.row_bias)
        column_bias, column_weight, top_column = _centered(teacher.column_bias)
    return Pass(
        problem=problem,
        student=k == 0,
        mode=mode,
        tied=tied,
        teacher_x=teacher_x,
        teacher_y=teacher_y,
        row_bias=row_bias,
        column_bias=column_bias,
        row_weight=row_weight,
        column_weight=column_weight,
        scalars=scalars.of(k, top_row, top_column),
    )


def _centered(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A bias, its weights `exp(bias - top)`, and its largest entry, 0 where there is none above -inf."""
    if bias is None:
        return None, None, None
    bias = bias.float().contiguous()
    top = bias.max()
    top = torch.where(top == -torch.inf, 0.0, top)
    return bias, (bias - top).exp(), top


def _with_contiguous_vectors(problem: Problem) -> Problem:
    """The kernels take matrices of any strides, vectors with stride 1."""
    given = {name: getattr(problem, name) for name in PROBLEM_TENSORS}
    vectors = {
        name: value.contiguous()
        for name, value in given.items()
        if value is not None and value.dim() == 1 and not value.is_contiguous()
    }
    return replace(problem, **vectors) if vectors else problem
