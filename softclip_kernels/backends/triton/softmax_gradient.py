# mypy: disallow-untyped-defs=False
"""A tile of G from its logits, through the softmaxes of student and teacher: what softmax_backward_kernel does between
its matrix product and its store.
"""

import triton
import triton.language as tl

from .coefficients import one_direction
from .tiles import NONE, TRANSPOSED


@triton.jit
def coefficient_sum(rows, columns, at):
    """`a_i u_j + b_j v_i`, (BLOCK_M, BLOCK_N); rows, columns and at as in through_softmax."""
    i, j, inside_i, inside_j = at
    coefficient_i, weight_i, _, _ = rows
    coefficient_j, weight_j, _, _ = columns
    a = tl.load(coefficient_i + i, mask=inside_i, other=0.0)[:, None]
    b = tl.load(coefficient_j + j, mask=inside_j, other=0.0)[None, :]
    if weight_j is not None:
        a = a * tl.load(weight_j + j, mask=inside_j, other=0.0)[None, :]
    if weight_i is not None:
        b = b * tl.load(weight_i + i, mask=inside_i, other=0.0)[:, None]
    return a + b


@triton.jit
def through_softmax(dot, factor, reference, rows, columns, at, IN_RANGE: tl.constexpr):
    """The gradient (BLOCK_M, BLOCK_N) with respect to the logits `dot * factor`, through the softmax along the tile's
    columns (one a row) and the one along its rows. rows and columns: (coefficient, bias weight, signed exponent, bias),
    each a pointer; weights and biases, of the row's or column's own, may be None."""
    i, j, inside_i, inside_j = at
    _, _, exponent_i, bias_i = rows
    _, _, exponent_j, bias_j = columns
    if IN_RANGE:
        value = tl.exp2(dot * factor - reference) * coefficient_sum(rows, columns, at)
    else:
        logits = dot * factor
        # Columns first: a thread holds entries of few rows and many columns, whose vectors take registers until here.
        value = one_direction(logits, exponent_j, j, inside_j, bias_i, i, inside_i, 0)
        value += one_direction(logits, exponent_i, i, inside_i, bias_j, j, inside_j, 1)
    return value


@triton.jit
def both_softmaxes(dot, t, student, teacher, at, STUDENT: tl.constexpr, TEACHER: tl.constexpr, IN_RANGE: tl.constexpr):
    """The tile of G through the softmaxes of the student on the logits dot and of the teacher on the logits t; the
    mirror's as well when TRANSPOSED, where t is the mirror's dot and each of the two teaches the other. student and
    teacher: (factor, reference, rows, columns)."""
    factor, reference, rows, columns = student
    teacher_factor, teacher_reference, teacher_rows, teacher_columns = teacher
    if STUDENT:
        value = through_softmax(dot, factor, reference, rows, columns, at, IN_RANGE)
        mirror = value
        if TEACHER == TRANSPOSED:
            mirror = through_softmax(
                dot, teacher_factor, teacher_reference, teacher_columns, teacher_rows, at, IN_RANGE
            )
            mirror += through_softmax(t, factor, reference, columns, rows, at, IN_RANGE)
        if TEACHER != NONE:
            value += through_softmax(t, teacher_factor, teacher_reference, teacher_rows, teacher_columns, at, IN_RANGE)
    else:
        value = through_softmax(t, teacher_factor, teacher_reference, teacher_rows, teacher_columns, at, IN_RANGE)
        mirror = value
    return value, mirror


@triton.jit
def finish(dot, t, student, teacher, at, in_range, STUDENT: tl.constexpr, TEACHER: tl.constexpr):
    """both_softmaxes, in the branch that the tile needs."""
    if in_range:
        value, mirror = both_softmaxes(dot, t, student, teacher, at, STUDENT, TEACHER, True)
    else:
        value, mirror = both_softmaxes(dot, t, student, teacher, at, STUDENT, TEACHER, False)
    return value, mirror
