"""From a Problem to the kernels' operands: which mode a teacher runs in, the common references, strides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem import PROBLEM_TENSORS, Problem, Source, TeacherOperand
from .call import strides
from .scalars import scalars
from .tiles import EMBEDDINGS, LOGITS, NONE, TRANSPOSED

MODES = {
    "none": NONE.value,
    "embeddings": EMBEDDINGS.value,
    "logits": LOGITS.value,
    "transposed": TRANSPOSED.value,
}
MODE_NAMES = {value: name for name, value in MODES.items()}


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
    def taught(self) -> bool:
        return self.mode != NONE.value

    @property
    def ranked(self) -> bool:
        """Ranks are counted in this pass."""
        return self.student and self.problem.row_threshold is not None

    @cached_property
    def case(self) -> tuple[str, bool, int]:
        """What shapes.candidates has to know of it: mode, plain and itemsize."""
        p = self.problem
        operands = [operand for operand in (p.x, p.y, self.teacher_x, self.teacher_y) if operand is not None]
        plain = p.row_segment is None and p.row_threshold is None and all(smooth(operand) for operand in operands)
        return MODE_NAMES[self.mode], plain, max(operand.element_size() for operand in operands)

    @property
    def biased(self) -> bool:
        return self.row_bias is not None or self.column_bias is not None

    @property
    def overlapping(self) -> bool:
        """Rows of the student's embeddings share memory, as expanded ones do."""
        return any(operand.stride(0) < operand.shape[1] for operand in (self.problem.x, self.problem.y))

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
            f"teacher {MODE_NAMES[self.mode]}",
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

    @cached_property
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


def passes(problem: Problem, known: Tensor | None = None, zeroed: Tensor | None = None) -> tuple[list[Pass], Tensor]:
    """The launches that cover a problem, of which the first holds the student and each holds one teacher; and their
    scalars as in Statistics: `known` where those are given. `zeroed` (N,) fp32 becomes 0 where they are not."""
    problem = _with_contiguous_vectors(problem)
    biases = [_Biases.of(teacher) for teacher in problem.teachers or (None,)]
    if known is None:
        known = scalars(problem, [(of.top_row, of.top_column) for of in biases], zeroed)
    return [_pass(problem, k, of, known[k]) for k, of in enumerate(biases)], known


def smooth(operand: Tensor) -> bool:
    """Whether rows stream in steps of 64 entries and 16 bytes a load, without masks."""
    row, step = operand.stride()
    return operand.shape[1] % 64 == 0 and step == 1 and row % 16 == 0 and operand.data_ptr() % 16 == 0


class _Biases(NamedTuple):
    """A teacher's biases, their weights `exp(bias - top)`, and their largest entries, 0 where there is none above -inf.
    None where there is no bias."""

    row_bias: Tensor | None
    row_weight: Tensor | None
    top_row: Tensor | None
    column_bias: Tensor | None
    column_weight: Tensor | None
    top_column: Tensor | None

    @staticmethod
    def of(teacher: TeacherOperand | None) -> _Biases:
        given = (None, None) if teacher is None else (teacher.row_bias, teacher.column_bias)
        rows, columns = (_centered(bias) for bias in given)
        return _Biases(*rows, *columns)


def _centered(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if bias is None:
        return None, None, None
    bias = bias.float().contiguous()
    top = bias.max()
    top = torch.where(top == -torch.inf, 0.0, top)
    return bias, (bias - top).exp(), top


def _pass(problem: Problem, k: int, biases: _Biases, own_scalars: Tensor) -> Pass:
    mode, tied, teacher_x, teacher_y = NONE.value, False, None, None
    if problem.teachers:
        teacher = problem.teachers[k]
        tied = teacher.scale is None
        if teacher.source == Source.EMBEDDINGS:
            mode, tied, teacher_x, teacher_y = EMBEDDINGS.value, False, teacher.x, teacher.y
        elif teacher.source == Source.LOGITS:
            mode = LOGITS.value
        elif len(problem.teachers) == 1:
            mode = TRANSPOSED.value
        else:  # beside other teachers the transposed logits are a product of their own
            mode, tied, teacher_x, teacher_y = EMBEDDINGS.value, False, problem.y, problem.x
    return Pass(
        problem=problem,
        student=k == 0,
        mode=mode,
        tied=tied,
        teacher_x=teacher_x,
        teacher_y=teacher_y,
        row_bias=biases.row_bias,
        column_bias=biases.column_bias,
        row_weight=biases.row_weight,
        column_weight=biases.column_weight,
        scalars=own_scalars,
    )


def _with_contiguous_vectors(problem: Problem) -> Problem:
    """The kernels take matrices of any strides, vectors with stride 1."""
    given = {name: getattr(problem, name) for name in PROBLEM_TENSORS}
    vectors = {
        name: value.contiguous()
        for name, value in given.items()
        if value is not None and value.dim() == 1 and not value.is_contiguous()
    }
    return replace(problem, **vectors) if vectors else problem
