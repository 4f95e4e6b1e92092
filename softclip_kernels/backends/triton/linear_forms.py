# mypy: disallow-untyped-defs=False
"""Linear forms (linear_form.py) as the kernels of the reduced loss and of its adjoint take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...linear_form import Coefficient, LinearForm, LinearForms
from ...problem import Problem

LONGEST = 2**15  # rows or columns, whose sum one program is through with in some 20 µs

NAMES = ("mass", "dot", "mean", "weight")
SIDES = ("row", "column")
VECTORS = {f"{side}_{name}": "*fp32?" for side in SIDES for name in NAMES}
NUMBERS = {f"{side}_{name}_number": "fp32" for side in SIDES for name in (*NAMES, "share")}
COEFFICIENTS = {**VECTORS, "positive_column": "*i64?", **NUMBERS, "rows": "i32", "columns": "i32"}
UNSPECIALIZED = [*NUMBERS, "rows", "columns"]


@triton.jit
def coefficient(vector, number, index, inside):
    """A linear form's, of some positions: of a vector, or one number for all."""
    if vector is not None:
        value = tl.load(vector + index, mask=inside, other=0.0)
    else:
        value = tl.zeros(index.shape, tl.float32) + number
    return value


class Coefficients(NamedTuple):
    """Linear forms as the kernels take them: in the order of VECTORS tensors or None, in that of NUMBERS numbers, what
    positives the columns' have, and the constants."""

    vectors: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]
    positive_column: Tensor | None
    constants: tuple[tuple[str, bool], ...]

    def arguments(self, problem: Problem, numbers: tuple[float, ...]) -> dict[str, Any]:
        return {
            **dict(zip(VECTORS, self.vectors, strict=True)),
            **dict(zip(NUMBERS, numbers, strict=True)),
            **dict(self.constants),
            "positive_column": self.positive_column,
            "rows": problem.rows,
            "columns": problem.columns,
        }


def coefficients_of(
    problem: Problem, forms: LinearForms, shares: tuple[float, float], diagonal: bool
) -> Coefficients | None:
    """None where the kernels do not take them: several teachers, many rows, coefficients in other layouts."""
    if len(problem.teachers) > 1 or max(problem.rows, problem.columns) > LONGEST:
        return None
    rows = _side(forms.rows, problem.rows)
    alike = forms.rows is forms.columns and problem.rows == problem.columns
    columns = rows if alike else _side(forms.columns, problem.columns)
    if rows is None or columns is None:
        return None
    vectors = (*rows[0], *columns[0])
    row_share, column_share = shares
    numbers = (*rows[1], row_share * (forms.rows is not None), *columns[1], column_share * (forms.columns is not None))
    constants = (
        ("ROWS", forms.rows is not None),
        ("COLUMNS", forms.columns is not None),
        ("SEEN", any(form is not None and form.seen is not None for form in forms)),
        ("TAUGHT", bool(problem.teachers)),
        ("POSITIVE", problem.positive_column is not None),
    )
    return Coefficients(vectors, numbers, None if diagonal else problem.positive_column, constants)


def _side(form: LinearForm | None, length: int) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]] | None:
    """Of one direction the vectors and the numbers, in the order of NAMES; None where there is another layout."""
    if form is None:
        return (None,) * 4, (0.0,) * 4
    dot: Coefficient = form.dots[0] if form.dots else 0.0
    mean: Coefficient = form.means[0] if form.means else 0.0
    vectors: list[Tensor | None] = []
    numbers: list[float] = []
    for each in (form.mass, dot, mean, form.weight):
        if not isinstance(each, Tensor):
            vectors.append(None)
            numbers.append(float(each))
        elif each.dtype == torch.float32 and each.is_contiguous() and each.shape == (length,):
            vectors.append(each)
            numbers.append(0.0)
        else:
            return None
    return tuple(vectors), tuple(numbers)
