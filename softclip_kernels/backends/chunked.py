"""The two block operations in plain PyTorch, streaming over square blocks that are recomputed in the backward pass.

O(N + M + block²) memory beyond inputs and results, any device, any floating dtype. It applies the reference's formulas
block by block and merges; blocks (I, J) and (J, I) are visited together when a teacher needs the transposed logits, so
that paired swap costs no extra matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import stats
from ..problem import Problem, Source, Statistics
from .reference import dense_gradient, dense_statistics, student_logits

BLOCK = {"cpu": 1024, "cuda": 4096}  # edge of a block: in fp32, 4 MiB and 64 MiB a matrix


class ChunkedBackend:
    name = "chunked"
    device: str | None = None

    def why_not(self, problem: Problem) -> str | None:
        return None

    def details(self) -> dict[str, str]:
        return {"block": f"{BLOCK['cpu']} on CPUs, {BLOCK['cuda']} elsewhere"}

    def forward(self, problem: Problem) -> Statistics:
        like = problem.x.new_empty(0, dtype=problem.accumulation_dtype)
        ranked = problem.row_threshold is not None
        rows = stats.empty(len(problem.teachers), problem.rows, like)
        columns = stats.empty(len(problem.teachers), problem.columns, like)
        positive = like.new_zeros(problem.rows if problem.positive_column is not None else 0)
        row_ranks = torch.zeros(problem.rows if ranked else 0, dtype=torch.int64, device=like.device)
        column_ranks = torch.zeros(problem.columns if ranked else 0, dtype=torch.int64, device=like.device)
        for i, j, block, z, z_transposed in _blocks(problem):
            part = dense_statistics(block, z, z_transposed)
            rows[:, i] = stats.merge(rows[:, i], part.rows)
            columns[:, j] = stats.merge(columns[:, j], part.columns)
            if problem.positive_column is not None:
                positive[i] += part.positive_logit
            if ranked:
                row_ranks[i] += part.row_ranks
                column_ranks[j] += part.column_ranks
        return Statistics(rows, columns, positive, row_ranks, column_ranks)

    def backward(
        self, problem: Problem, statistics: Statistics, grad_rows: Tensor, grad_columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = problem.accumulation_dtype
        gx = problem.x.new_zeros(problem.x.shape, dtype=dtype)
        gy = problem.y.new_zeros(problem.y.shape, dtype=dtype)
        for i, j, block, z, z_transposed in _blocks(problem):
            g = dense_gradient(
                block,
                z,
                z_transposed,
                statistics.rows[:, i],
                statistics.columns[:, j],
                grad_rows[:, i],
                grad_columns[:, j],
            )
            gx[i].addmm_(g, block.y.to(dtype))
            gy[j].addmm_(g.T, block.x.to(dtype))
        return gx, gy


def _blocks(problem: Problem) -> Iterator[tuple[slice, slice, Problem, Tensor, Tensor]]:
    """Every block once: its rows, its columns, its sub-problem, its logits and the logits of the transposed pairs (the
    logits themselves where no teacher asks for them)."""
    transposed = any(teacher.source == Source.TRANSPOSED for teacher in problem.teachers)
    edge = BLOCK.get(problem.x.device.type, BLOCK["cuda"])
    row_slices, column_slices = _slices(problem.rows, edge), _slices(problem.columns, edge)
    for index, i in enumerate(row_slices):
        for j in column_slices[index if transposed else 0 :]:
            block = problem.block(i, j)
            z = student_logits(block)
            if not transposed or i == j:
                yield i, j, block, z, z.T if transposed else z
                continue
            mirror = problem.block(j, i)
            z_mirror = student_logits(mirror)
            yield i, j, block, z, z_mirror.T
            yield j, i, mirror, z_mirror, z.T


def _slices(length: int, edge: int) -> list[slice]:
    return [slice(start, min(start + edge, length)) for start in range(0, length, edge)]
