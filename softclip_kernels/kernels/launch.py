"""The host's side of the kernels: super-blocks, scratch within its budget, sums in a fixed order."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..problem import Problem, Statistics
from .configs import GROUP, Config, candidates
from .exact import exact_rows_kernel
from .gradient import coefficients_kernel, gradient_kernel
from .operands import Pass, passes
from .statistics import HEADROOM, statistics_kernel

logger = logging.getLogger("softclip_kernels")

SCRATCH = 32 * 2**20  # bytes of partial sums in the forward pass, of G in the backward pass
VECTOR_BLOCK = 1024
LN2 = math.log(2)


def forward(problem: Problem) -> Statistics:
    n, m, teachers = problem.rows, problem.columns, len(problem.teachers)
    like = problem.x.new_empty(0, dtype=torch.float32)
    rows, columns = like.new_empty(1 + 2 * teachers, n), like.new_empty(1 + 2 * teachers, m)
    positive = like.new_zeros(n if problem.positive is not None else 0)
    row_ranks, column_ranks = (torch.empty(0, dtype=torch.int64, device=like.device) for _ in range(2))
    for k, one in enumerate(passes(problem)):
        row_sums, column_sums = _centred_sums(one, positive)
        if one.student and problem.row_threshold is not None:
            row_ranks, column_ranks = row_sums[-1].to(torch.int64), column_sums[-1].to(torch.int64)
        _finish(one, row_sums, rows, k, m)
        _finish(one.transposed(), column_sums, columns, k, n)
    return Statistics(rows, columns, positive, row_ranks, column_ranks)


def _centred_sums(one: Pass, positive: Tensor) -> tuple[Tensor, Tensor]:
    """(statistics, N) and (statistics, M) fp32: the student's sum where this pass holds it, the teacher's two, and the
    ranks where the first pass is asked for them. `positive` (N,) is filled by the first pass."""
    problem = one.problem
    n, m = problem.rows, problem.columns
    ranked = one.student and problem.row_threshold is not None
    count = int(one.student) + 2 * int(one.taught) + int(ranked)
    config = _config("statistics", one)
    edge = _forward_edge(config, count, one.paired, max(n, m))
    x = problem.x
    row_sums = torch.zeros(count, n, dtype=torch.float32, device=x.device)
    column_sums = torch.zeros(count, m, dtype=torch.float32, device=x.device)
    slots_m, slots_n = triton.cdiv(edge, config.block_m), triton.cdiv(edge, config.block_n)
    shapes = ((slots_n, count, edge), (slots_m, count, edge))
    direct = [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes]
    mirror = (
        [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes[::-1]] if one.paired else direct
    )
    arguments = one.tensors() | _constants(one, config) | config.options()
    arguments |= {
        "row_weight": one.row_weight,
        "column_weight": one.column_weight,
        "positive": problem.positive if one.student else None,
        "row_threshold": problem.row_threshold if ranked else None,
        "column_threshold": problem.column_threshold if ranked else None,
        "positive_logit": positive,
        "edge": edge,
        "STATISTICS": count,
        "TIED": one.tied,
        "GROUP": GROUP,
        "RAGGED": n % config.block_m != 0 or m % config.block_n != 0,
    }
    for i, j in _super_blocks(n, m, edge, one.paired):
        if one.paired and i == j:
            for buffer in (*direct, *mirror):
                buffer.zero_()
        tiles_m, tiles_n = _tiles(i, config.block_m), _tiles(j, config.block_n)
        statistics_kernel[(tiles_m * tiles_n,)](
            row_sums=direct[0],
            column_sums=direct[1],
            mirror_row_sums=mirror[0],
            mirror_column_sums=mirror[1],
            row_start=i.start,
            row_end=i.stop,
            column_start=j.start,
            column_end=j.stop,
            **arguments,
        )
        _add_partial(row_sums, direct[0], i, tiles_n)
        _add_partial(column_sums, direct[1], j, tiles_m)
        if one.paired:
            _add_partial(row_sums, mirror[0], j, tiles_m)
            _add_partial(column_sums, mirror[1], i, tiles_n)
    return row_sums, column_sums


def _add_partial(sums: Tensor, partial: Tensor, part: slice, slots: int) -> None:
    sums[:, part] += partial[:slots, :, : part.stop - part.start].sum(0)


def _finish(one: Pass, sums: Tensor, statistics: Tensor, k: int, others: int) -> None:
    """Sums over `others` columns of every row become the statistics of the student and of teacher k, (1 + 2K, N)."""
    # Exponentials below fp32's smallest normal number vanish. All of them together are below half an ulp of a sum that
    # is at least this.
    smallest = max(others, 1) * 2.0**-102
    reference = (one.scalars[2] - HEADROOM.value).clamp(min=0)
    teacher_reference = (one.scalars[4] - HEADROOM.value).clamp(min=0) + one.scalars[6]
    fine = torch.ones(sums.shape[1], dtype=torch.bool, device=sums.device)
    if one.student:
        statistics[0] = (reference + sums[0].log2()) * LN2
        fine &= (sums[0] >= smallest) & (sums[0] < torch.inf)
    lse, mean = statistics[1 + 2 * k : 3 + 2 * k] if one.taught else (statistics[0], statistics[0])
    if one.taught:
        total, weighted = sums[int(one.student) : int(one.student) + 2]
        lse.copy_((teacher_reference + total.log2()) * LN2)
        mean.copy_(weighted / total * one.scalars[0])
        fine &= (total >= smallest) & (total < torch.inf) & weighted.isfinite()
    one = one.unpaired()
    config = _config("exact", one)
    arguments = one.tensors() | _constants(one, config) | config.options()
    exact_rows_kernel[(triton.cdiv(one.problem.rows, config.block_m),)](
        column_bias=one.column_bias,
        suspect=(~fine).to(torch.int8),
        log_sum_exp=statistics[0],
        teacher_log_sum_exp=lse,
        teacher_mean=mean,
        rows=one.problem.rows,
        columns=one.problem.columns,
        **arguments,
    )


def backward(
    problem: Problem, statistics: Statistics, grad_rows: Tensor, grad_columns: Tensor
) -> tuple[Tensor, Tensor]:
    unit = _unit(problem.x.dtype, grad_rows, grad_columns)
    if unit is not None:
        grad_rows, grad_columns = grad_rows / unit, grad_columns / unit
    launches = passes(problem)
    paired = launches[0].paired
    calls = [_gradient_calls(one, k, statistics, grad_rows, grad_columns) for k, one in enumerate(launches)]
    edge = _backward_edge(problem, paired, calls)
    device, dtype = problem.x.device, problem.x.dtype
    gx = torch.zeros(problem.x.shape, dtype=torch.float32, device=device)
    gy = torch.zeros(problem.y.shape, dtype=torch.float32, device=device)
    g, *mirror = (torch.empty(edge, edge, dtype=dtype, device=device) for _ in range(1 + paired))
    # Several teachers add up in fp32, from one buffer to the next, and are rounded once.
    wide = [torch.empty_like(g, dtype=torch.float32) for _ in calls[:-1][:2]]
    for i, j in _super_blocks(problem.rows, problem.columns, edge, paired):
        mirrored = paired and i != j
        for k, pair in enumerate(calls):
            for config, arguments in pair:
                gradient_kernel[(_tiles(i, config.block_m) * _tiles(j, config.block_n),)](
                    previous=wide[(k - 1) % 2] if k > 0 else None,
                    g=g if k == len(calls) - 1 else wide[k % 2],
                    mirror_g=mirror[0] if mirrored else g,
                    edge=edge,
                    row_start=i.start,
                    row_end=i.stop,
                    column_start=j.start,
                    column_end=j.stop,
                    **arguments,
                )
        _add_products(g, problem, i, j, gx, gy)
        if mirrored:
            _add_products(mirror[0], problem, j, i, gx, gy)
    return (gx, gy) if unit is None else (gx.mul_(unit), gy.mul_(unit))


def _gradient_calls(
    one: Pass, k: int, statistics: Statistics, grad_rows: Tensor, grad_columns: Tensor
) -> list[tuple[Config, dict[str, Any]]]:
    """The two launches of a super-block: the shared exponential, and the tiles that it has to leave out."""
    teacher = k if one.taught else -1  # without a teacher its arguments are read nowhere
    vectors: dict[str, Tensor] = {}
    for side, statistic, gradient, top in (
        ("row", statistics.rows, grad_rows, 6),
        ("column", statistics.columns, grad_columns, 5),
    ):
        length = statistic.shape[1]
        vectors[f"{side}_lse"] = statistic[0].contiguous()
        vectors[f"{side}_grad"] = gradient[0]
        vectors[f"teacher_{side}_lse"] = statistic[1 + 2 * teacher].contiguous()
        vectors[f"teacher_{side}_grad"] = gradient[1 + teacher]
        for name in (f"{side}_own", f"{side}_taught"):
            vectors[name] = statistic.new_empty(length, dtype=torch.float32)
        vectors[f"{side}_fine"] = torch.empty(length, dtype=torch.int8, device=statistic.device)
        coefficients_kernel[(triton.cdiv(length, VECTOR_BLOCK),)](
            vectors[f"{side}_lse"],
            vectors[f"{side}_grad"],
            vectors[f"teacher_{side}_lse"],
            vectors[f"teacher_{side}_grad"],
            one.scalars,
            vectors[f"{side}_own"],
            vectors[f"{side}_taught"],
            vectors[f"{side}_fine"],
            length,
            TOP=top,
            STUDENT=one.student,
            TEACHER=one.mode,
            BLOCK=VECTOR_BLOCK,
        )
    arguments = one.tensors() | vectors
    arguments |= {
        "row_bias": one.row_bias,
        "column_bias": one.column_bias,
        "row_weight": one.row_weight,
        "column_weight": one.column_weight,
        "positive": one.problem.positive,
        "TIED": one.tied,
        "GROUP": GROUP,
    }
    calls = []
    for exact in (False, True):
        config = _config("exact gradient" if exact else "gradient", one)
        calls.append((config, arguments | {"EXACT": exact} | _constants(one, config) | config.options()))
    return calls


def _unit(dtype: torch.dtype, grad_rows: Tensor, grad_columns: Tensor) -> Tensor | None:
    """float16 holds nothing below 6e-8, and an entry of G is a probability over twice the batch: gradients are taken in
    a unit (0-d) in which the largest is 2^12, and smaller ones keep 36 more powers of two. None for other dtypes."""
    if dtype != torch.float16:
        return None
    peak = torch.maximum(grad_rows.abs().max(), grad_columns.abs().max())
    return torch.where((peak > 0) & peak.isfinite(), peak / 2.0**12, 1.0)


def _add_products(g: Tensor, problem: Problem, i: slice, j: slice, gx: Tensor, gy: Tensor) -> None:
    """`gx[i] += g @ y[j]` and `gy[j] += g.T @ x[i]`, for the (rows i, columns j) corner of the scratch."""
    block = g[: i.stop - i.start, : j.stop - j.start]
    _add_product(gx[i], block, problem.y[j])
    _add_product(gy[j], block.T, problem.x[i])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, total fp32, accumulated in fp32 whatever the operands are."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif _adds_in_place(a.dtype, a.device):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b, out_dtype=torch.float32)


@functools.cache
def _adds_in_place(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds a product of 16-bit matrices to an fp32 sum in place. Some versions want the sum in the
    operands' dtype; a temporary, at twice the traffic on the sum, serves there. Tried once, on 2^24 + 3 * 3 * 16, which
    only fp32 holds."""
    total = torch.full((16, 16), 2.0**24, dtype=torch.float32, device=device)
    a = torch.full((16, 16), 3.0, dtype=dtype, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        logger.info("triton backend: sums of gradients take a temporary (%s)", str(error).split("\n")[0])
        return False
    return bool((total == 2.0**24 + 144).all())


def _constants(one: Pass, config: Config) -> dict[str, Any]:
    teacher_x = one.problem.x if one.teacher_x is None else one.teacher_x
    return {
        "STUDENT": one.student,
        "TEACHER": one.mode,
        "EVEN": one.problem.x.shape[1] % config.block_d == 0,
        "TEACHER_EVEN": teacher_x.shape[1] % config.block_d == 0,
        "PRECISION": _precision(one.problem.x),
        "TEACHER_PRECISION": _precision(teacher_x),
        **config.constants(),
    }


def _precision(operand: Tensor) -> str:
    """How fp32 operands are multiplied: in three tf32 products, or one where torch.set_float32_matmul_precision allows
    it, as torch's own products in the backward pass do. Other operands have one way."""
    if operand.dtype == torch.float32 and operand.is_cuda:
        if torch.get_float32_matmul_precision() != "highest":
            return "tf32"
        return "ieee" if torch.version.hip else "tf32x3"
    return "ieee"


def _config(kind: str, one: Pass) -> Config:
    problem = one.problem
    plain = (
        problem.row_segment is None
        and problem.row_threshold is None
        and problem.rows % 256 == problem.columns % 256 == 0
    )
    return candidates(kind, one.taught, one.paired, plain, one.itemsize, architecture(problem.x.device))[0]


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_90, gfx942, ...; "interpreter" on the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _forward_edge(config: Config, count: int, paired: bool, longest: int) -> int:
    """The largest super-block, in whole tiles, whose partial sums fit in the scratch."""
    tile = max(config.block_m, config.block_n)
    per_entry = 4 * count * (1 + paired) * (1 / config.block_m + 1 / config.block_n)
    return _edge(SCRATCH / per_entry, tile, longest)


def _backward_edge(problem: Problem, paired: bool, calls: list[list[tuple[Config, dict[str, Any]]]]) -> int:
    """The largest super-block, in whole tiles, whose G fits in the scratch."""
    tile = max(max(config.block_m, config.block_n) for pair in calls for config, _ in pair)
    itemsize = problem.x.element_size()
    return _edge(
        SCRATCH / (itemsize * (1 + paired) + 4 * len(calls[:-1][:2])), tile, max(problem.rows, problem.columns)
    )


def _edge(entries: float, tile: int, longest: int) -> int:
    return min(max(int(entries**0.5) // tile, 1), triton.cdiv(longest, tile)) * tile


def _super_blocks(n: int, m: int, edge: int, paired: bool) -> Iterator[tuple[slice, slice]]:
    """Row and column ranges; paired: only those on and above the diagonal."""
    for row_start in range(0, n, edge):
        i = slice(row_start, min(row_start + edge, n))
        for column_start in range(row_start if paired else 0, m, edge):
            yield i, slice(column_start, min(column_start + edge, m))


def _tiles(part: slice, block: int) -> int:
    return triton.cdiv(part.stop - part.start, block)
