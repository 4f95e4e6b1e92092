"""The dense definition of the two block operations: every matrix is stored, every line reads like the formula.

It is what the fast backends are compared with, and the one backend that may hold (N, M) tensors. `dense_statistics` and
`dense_gradient` work on a block whose logits are given; the chunked backend applies them block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import precision
from ..problem import Problem, Source, TeacherOperand
from ..stats import InputGradients, Statistics, StatisticsGradient, Wanted
from . import finish


class ReferenceBackend:
    name = "reference"
    device: str | None = None

    def why_not(self, problem: Problem) -> str | None:
        return None

    def details(self) -> dict[str, str]:
        return {}

    def forward(self, problem: Problem, keep: bool = False) -> Statistics:
        z = student_logits(problem)
        return dense_statistics(problem, (z, z.T))

    def backward(
        self,
        problem: Problem,
        statistics: Statistics,
        gradient: StatisticsGradient,
        wanted: Wanted,
    ) -> InputGradients:
        z = student_logits(problem)
        g = dense_gradient(problem, (z, z.T), statistics, gradient)
        needs_gx, needs_gy = wanted.products
        gx = g @ problem.y.to(g.dtype) if needs_gx else None
        gy = g.T @ problem.x.to(g.dtype) if needs_gy else None
        return finish.gradients(problem, statistics, gradient, wanted, (gx, gy))


def student_logits(problem: Problem) -> Tensor:
    """`z = scale * x @ y.T`, (N, M), in the accumulation dtype. Ranks are counted against exact thresholds, so torch's
    settings must not round what they count."""
    dtype = problem.accumulation_dtype
    x, y = problem.x.to(dtype), problem.y.to(dtype)
    if problem.row_threshold is not None and dtype == torch.float32 and precision.rounds_operands(x.device):
        return problem.scale * precision.unrounded_product(x, y)
    return problem.scale * (x @ y.T)


Logits = tuple[Tensor, Tensor]
"""A block's logits z (N, M) and, for TRANSPOSED teachers, those of the swapped pairs (N, M): at (i, j) z's (j, i)."""


def dense_statistics(problem: Problem, logits: Logits) -> Statistics:
    """Statistics of a block from its logits."""
    z, excluded = logits[0], _excluded(problem)
    student = _exclude(z, excluded)
    rows, columns = [student.logsumexp(1)], [student.logsumexp(0)]
    for teacher in problem.teachers:
        row_logits, column_logits = _teacher_logits(teacher, logits, excluded)
        rows += _log_sum_exp_and_mean(row_logits, z, 1)
        columns += _log_sum_exp_and_mean(column_logits, z, 0)
    positive = z.new_empty(0)
    if problem.positive_column is not None:
        inside, column = problem.positives_inside()
        positive = torch.where(inside, z.gather(1, column[:, None])[:, 0], 0.0)
    ranks: list[Tensor] = []
    if problem.row_threshold is not None and problem.column_threshold is not None:
        ranks.append((student > problem.row_threshold[:, None]).sum(1))
        ranks.append((student > problem.column_threshold[None, :]).sum(0))
    return Statistics.of(torch.stack(rows), torch.stack(columns), positive, *ranks)


def dense_gradient(problem: Problem, logits: Logits, statistics: Statistics, gradient: StatisticsGradient) -> Tensor:
    """G (N, M) of the Backend protocol without the positives' entries, from a block's logits."""
    excluded = _excluded(problem)
    student = _exclude(logits[0], excluded)
    of_row, *of_row_teachers = gradient.rows[:, :, None]
    of_column, *of_column_teachers = gradient.columns[:, None, :]
    g = of_row * _shifted_exp(student, statistics.rows.lse[:, None])
    g += of_column * _shifted_exp(student, statistics.columns.lse[None, :])
    for k, teacher in enumerate(problem.teachers):
        row_logits, column_logits = _teacher_logits(teacher, logits, excluded)
        g += of_row_teachers[k] * _shifted_exp(row_logits, statistics.rows.teacher_lse[k][:, None])
        g += of_column_teachers[k] * _shifted_exp(column_logits, statistics.columns.teacher_lse[k][None, :])
    if problem.positive_column is not None:
        inside, column = problem.positives_inside()
        kept = torch.where(inside, 0.0, g.gather(1, column[:, None])[:, 0])
        g.scatter_(1, column[:, None], kept[:, None])
    return g


def _teacher_logits(teacher: TeacherOperand, logits: Logits, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """The teacher's (N, M) logits for the row direction and for the column direction, biases added."""
    z, z_transposed = logits
    if teacher.source == Source.EMBEDDINGS:
        assert teacher.x is not None and teacher.y is not None
        t = teacher.x.to(z.dtype) @ teacher.y.to(z.dtype).T
    else:
        t = z if teacher.source == Source.LOGITS else z_transposed
    if teacher.scale is not None:
        t = teacher.scale * t
    t = _exclude(t, excluded)
    row_logits = t if teacher.column_bias is None else t + teacher.column_bias[None, :]
    column_logits = t if teacher.row_bias is None else t + teacher.row_bias[:, None]
    return row_logits, column_logits


def _log_sum_exp_and_mean(teacher_logits: Tensor, z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    # Weights that sum to 1 to the last bit: exp(t - lse) would carry the rounding of lse into a mean of size |z|.
    log_sum_exp, weights = teacher_logits.logsumexp(dim), teacher_logits.softmax(dim)
    mean = (weights * z).sum(dim)
    return log_sum_exp, torch.where(log_sum_exp == -torch.inf, 0.0, mean)  # everything is excluded


def _excluded(problem: Problem) -> Tensor | None:
    if problem.row_segment is None or problem.column_segment is None:
        return None
    return problem.row_segment[:, None] != problem.column_segment[None, :]


def _exclude(logits: Tensor, excluded: Tensor | None) -> Tensor:
    return logits if excluded is None else logits.masked_fill(excluded, -torch.inf)


def _shifted_exp(logits: Tensor, log_sum_exp: Tensor) -> Tensor:
    """`exp(logits - log_sum_exp)`, and 0 instead of NaN where everything is excluded (both are -inf)."""
    return torch.where(logits == -torch.inf, 0.0, (logits - log_sum_exp).exp())
