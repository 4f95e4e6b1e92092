"""The two block operations in plain PyTorch, streaming over square blocks that are recomputed in the backward pass.

O(N + M + block²) memory beyond inputs and results, any device, any floating dtype. It applies the reference's formulas
block by block and merges; blocks (I, J) and (J, I) are visited together when a teacher needs the transposed logits, so
that paired swap costs no extra matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..problem import Problem, Source
from ..stats import InputGradients, Statistics, StatisticsGradient, Wanted
from . import finish
from .reference import Logits, dense_gradient, dense_statistics, student_logits

BLOCK = {"cpu": 1024, "cuda": 4096}  # edge of a block: in fp32, 4 MiB and 64 MiB a matrix


class ChunkedBackend:
    name = "chunked"
    device: str | None = None

    def why_not(self, problem: Problem) -> str | None:
        return None

    def details(self) -> dict[str, str]:
        return {"block": f"{BLOCK['cpu']} on CPUs, {BLOCK['cuda']} elsewhere"}

    def forward(self, problem: Problem, keep: bool = False) -> Statistics:
        whole = Statistics.empty(problem)
        for i, j, block, logits in _blocks(problem):
            part = dense_statistics(block, logits)
            whole.rows.packed[:, i] = whole.rows.part(i).merge(part.rows).packed
            whole.columns.packed[:, j] = whole.columns.part(j).merge(part.columns).packed
            if problem.positive_column is not None:
                whole.positive_logit[i] += part.positive_logit
            if problem.row_threshold is not None:
                whole.row_ranks[i] += part.row_ranks
                whole.column_ranks[j] += part.column_ranks
        return whole

    def backward(
        self,
        problem: Problem,
        statistics: Statistics,
        gradient: StatisticsGradient,
        wanted: Wanted,
    ) -> InputGradients:
        dtype = problem.accumulation_dtype
        gx, gy = problem.zero_gradients(wanted.products)
        for i, j, block, logits in _blocks(problem):
            known = statistics._replace(rows=statistics.rows.part(i), columns=statistics.columns.part(j))
            incoming = gradient._replace(rows=gradient.rows[:, i], columns=gradient.columns[:, j])
            g = dense_gradient(block, logits, known, incoming)
            if gx is not None:
                gx[i].addmm_(g, block.y.to(dtype))
            if gy is not None:
                gy[j].addmm_(g.T, block.x.to(dtype))
        return finish.gradients(problem, statistics, gradient, wanted, (gx, gy))


def _blocks(problem: Problem) -> Iterator[tuple[slice, slice, Problem, Logits]]:
    """Every block once: its rows, its columns, its sub-problem, its logits and those of the swapped pairs (the logits
    themselves where no teacher asks for them)."""
    transposed = any(teacher.source == Source.TRANSPOSED for teacher in problem.teachers)
    edge = BLOCK.get(problem.x.device.type, BLOCK["cuda"])
    row_slices, column_slices = _slices(problem.rows, edge), _slices(problem.columns, edge)
    for index, i in enumerate(row_slices):
        for j in column_slices[index if transposed else 0 :]:
            block = problem.block(i, j)
            z = student_logits(block)
            if not transposed or i == j:
                yield i, j, block, (z, z.T if transposed else z)
                continue
            mirror = problem.block(j, i)
            z_mirror = student_logits(mirror)
            yield i, j, block, (z, z_mirror.T)
            yield j, i, mirror, (z_mirror, z.T)


def _slices(length: int, edge: int) -> list[slice]:
    return [slice(start, min(start + edge, length)) for start in range(0, length, edge)]
