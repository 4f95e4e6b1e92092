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

from ..problem import Problem
from ..stats import Statistics
from ..version import __version__
from . import tuning
from .calls import Call
from .configs import GROUP, Config, candidates
from .exact import exact_rows_kernel
from .gradient import FINE, VECTOR_BLOCK, coefficients_kernel, gradient_kernel
from .operands import Pass, passes
from .statistics import HEADROOM, statistics_kernel

logger = logging.getLogger("softclip_kernels")

SCRATCH = 32 * 2**20  # bytes of partial sums in the forward pass, of G in the backward pass
LN2 = math.log(2)


def forward(problem: Problem) -> Statistics:
    n, m, teachers = problem.rows, problem.columns, len(problem.teachers)
    like = problem.x.new_empty(0, dtype=torch.float32)
    rows, columns = like.new_empty(1 + 2 * teachers, n), like.new_empty(1 + 2 * teachers, m)
    positive = like.new_zeros(n if problem.positive_column is not None else 0)
    row_ranks, column_ranks = (torch.empty(0, dtype=torch.int64, device=like.device) for _ in range(2))
    for k, one in enumerate(passes(problem)):
        row_sums, column_sums = _centred_sums(one, positive)
        if one.student and problem.row_threshold is not None:
            row_ranks, column_ranks = row_sums[-1].to(torch.int64), column_sums[-1].to(torch.int64)
        _finish(one, row_sums, rows, k, m)
        _finish(one.transposed(), column_sums, columns, k, n)
    return Statistics.of(rows, columns, positive, row_ranks, column_ranks)


def _centred_sums(one: Pass, positive: Tensor) -> tuple[Tensor, Tensor]:
    """(statistics, N) and (statistics, M) fp32: the student's sum where this pass holds it, the teacher's two, and the
    ranks where the first pass is asked for them. `positive` (N,) is filled by the first pass."""
    n, m = one.problem.rows, one.problem.columns

    def trial(config: Config) -> tuple[tuning.Launch, int]:
        launch = _StatisticsLaunch(one, positive, config)
        i, j = next(_super_blocks(n, m, launch.edge, one.paired))
        return functools.partial(launch, i, j), (i.stop - i.start) * (j.stop - j.start)

    config = _config("statistics", one, trial)
    launch = _StatisticsLaunch(one, positive, config)
    row_sums = positive.new_zeros(launch.count, n)
    column_sums = positive.new_zeros(launch.count, m)
    for i, j in _super_blocks(n, m, launch.edge, one.paired):
        tiles_m, tiles_n = launch(i, j)
        _add_partial(row_sums, launch.direct[0], i, tiles_n)
        _add_partial(column_sums, launch.direct[1], j, tiles_m)
        if one.paired:
            _add_partial(row_sums, launch.mirror[0], j, tiles_m)
            _add_partial(column_sums, launch.mirror[1], i, tiles_n)
    return row_sums, column_sums


class _StatisticsLaunch:
    """Fills the partial sums of a super-block: direct, of its rows and of its columns, and the mirror's when paired."""

    def __init__(self, one: Pass, positive: Tensor, config: Config) -> None:
        problem = one.problem
        ranked = one.student and problem.row_threshold is not None
        count = int(one.student) + 2 * int(one.taught) + int(ranked)
        edge = _forward_edge(config, count, one.paired, max(problem.rows, problem.columns))
        slots_m, slots_n = edge // config.block_m, edge // config.block_n
        shapes = ((slots_n, count, edge), (slots_m, count, edge))
        self.direct = [positive.new_empty(shape) for shape in shapes]
        self.mirror = [positive.new_empty(shape) for shape in shapes[::-1]] if one.paired else self.direct
        self.count, self.edge, self.paired, self.config = count, edge, one.paired, config
        arguments = one.tensors() | _constants(one, config)
        arguments |= {
            "row_weight": one.row_weight,
            "column_weight": one.column_weight,
            "positive": problem.positive_column if one.student else None,
            "row_threshold": problem.row_threshold if ranked else None,
            "column_threshold": problem.column_threshold if ranked else None,
            "positive_logit": positive,
            "row_sums": self.direct[0],
            "column_sums": self.direct[1],
            "mirror_row_sums": self.mirror[0],
            "mirror_column_sums": self.mirror[1],
            "edge": edge,
            "STATISTICS": count,
            "TIED": one.tied,
            "GROUP": GROUP,
        }
        self.call = Call(statistics_kernel, arguments, config.options())

    def __call__(self, i: slice, j: slice) -> tuple[int, int]:
        """How many tiles there are from top to bottom and from left to right."""
        if self.paired and i == j:  # on the diagonal some slots are left alone
            for buffer in (*self.direct, *self.mirror):
                buffer.zero_()
        tiles_m, tiles_n = _tiles(i, self.config.block_m), _tiles(j, self.config.block_n)
        self.call(tiles_m * tiles_n, **_bounds(i, j))
        return tiles_m, tiles_n


def _bounds(i: slice, j: slice) -> dict[str, int]:
    return {"row_start": i.start, "row_end": i.stop, "column_start": j.start, "column_end": j.stop}


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
    config = _candidates("exact", one)[0]
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
    edge = _backward_edge(problem, launches)
    device, dtype = problem.x.device, problem.x.dtype
    gx = torch.zeros(problem.x.shape, dtype=torch.float32, device=device)
    gy = torch.zeros(problem.y.shape, dtype=torch.float32, device=device)
    g, *mirror = (torch.empty(edge, edge, dtype=dtype, device=device) for _ in range(1 + paired))
    # Several teachers add up in fp32, from one buffer to the next, and are rounded once.
    wide = [torch.empty_like(g, dtype=torch.float32) for _ in launches[:-1][:2]]
    blocks = list(_super_blocks(problem.rows, problem.columns, edge, paired))
    calls = []
    for k, one in enumerate(launches):
        arguments = _gradient_arguments(one, k, statistics, grad_rows, grad_columns)
        arguments |= {
            "previous": wide[(k - 1) % 2] if k > 0 else None,
            "g": g if k == len(launches) - 1 else wide[k % 2],
            "edge": edge,
        }
        calls.append(_gradient_launch(one, arguments, mirror, blocks[0]))
    for i, j in blocks:
        for call in calls:
            call(i, j)
        _add_products(g, problem, i, j, gx, gy)
        if paired and i != j:
            _add_products(mirror[0], problem, j, i, gx, gy)
    return (gx, gy) if unit is None else (gx.mul_(unit), gy.mul_(unit))


class _GradientLaunch:
    """Fills a super-block of G, and the mirror's beside it."""

    def __init__(self, one: Pass, arguments: dict[str, Any], mirror: list[Tensor], config: Config) -> None:
        self.g, self.mirror, self.config = arguments["g"], mirror, config
        self.call = Call(gradient_kernel, arguments | _constants(one, config), config.options())

    def __call__(self, i: slice, j: slice) -> None:
        self.call(
            _tiles(i, self.config.block_m) * _tiles(j, self.config.block_n),
            mirror_g=self.mirror[0] if self.mirror and i != j else self.g,
            **_bounds(i, j),
        )


def _gradient_launch(
    one: Pass, arguments: dict[str, Any], mirror: list[Tensor], block: tuple[slice, slice]
) -> _GradientLaunch:
    def trial(config: Config) -> tuple[tuning.Launch, int]:
        i, j = block
        launch = _GradientLaunch(one, arguments, mirror, config)
        return functools.partial(launch, i, j), (i.stop - i.start) * (j.stop - j.start)

    return _GradientLaunch(one, arguments, mirror, _config("gradient", one, trial))


def _gradient_arguments(
    one: Pass, k: int, statistics: Statistics, grad_rows: Tensor, grad_columns: Tensor
) -> dict[str, Any]:
    """What all super-blocks share: embeddings, biases, and the vectors that coefficients_kernel prepares."""
    teacher = k if one.taught else -1  # without a teacher its arguments are read nowhere
    arguments = one.tensors()
    for side, statistic, gradient, top in (
        ("row", statistics.rows.packed, grad_rows, 6),
        ("column", statistics.columns.packed, grad_columns, 5),
    ):
        length = statistic.shape[1]
        prepared = {
            f"{side}_{name}": statistic.new_empty(length, dtype=torch.float32)
            for name in ("own", "taught", "own_exact", "taught_exact")
        }
        flags = triton.cdiv(length, FINE.value)
        prepared[f"{side}_fine"] = torch.empty(flags, dtype=torch.int8, device=statistic.device)
        coefficients_kernel[(triton.cdiv(length, VECTOR_BLOCK),)](
            statistic[0].contiguous(),
            gradient[0],
            statistic[1 + 2 * teacher].contiguous(),
            gradient[1 + teacher],
            one.scalars,
            *prepared.values(),
            length,
            TOP=top,
            STUDENT=one.student,
            TEACHER=one.mode,
            BLOCK=VECTOR_BLOCK,
        )
        arguments |= prepared
    return arguments | {
        "row_bias": one.row_bias,
        "column_bias": one.column_bias,
        "row_weight": one.row_weight,
        "column_weight": one.column_weight,
        "positive": one.problem.positive_column,
        "TIED": one.tied,
        "GROUP": GROUP,
    }


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
    """How fp32 operands are multiplied: in three tf32 products, or one where torch's settings allow it, as torch's own
    products in the backward pass do. Other operands have one way."""
    if operand.dtype == torch.float32 and operand.is_cuda:
        if _tf32_allowed():
            return "tf32"
        return "ieee" if torch.version.hip else "tf32x3"
    return "ieee"


def _tf32_allowed() -> bool:
    """torch 2.9 has a setting for CUDA's products and one above it for everything ("none": not set), beside the older
    one, which it refuses to tell where the new ones disagree with it."""
    for settings in (torch.backends.cuda.matmul, torch.backends):
        chosen = getattr(settings, "fp32_precision", "none")
        if chosen != "none":
            return chosen == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def _candidates(kind: str, one: Pass) -> tuple[Config, ...]:
    problem = one.problem
    operands = (problem.x, problem.y, one.teacher_x, one.teacher_y)
    smooth = all(_smooth(operand) for operand in operands if operand is not None)
    plain = smooth and problem.row_segment is None and problem.row_threshold is None
    return candidates(kind, one.taught, one.paired, plain, one.itemsize, architecture(problem.x.device))


def _smooth(operand: Tensor) -> bool:
    """Whether rows stream in steps of 64 entries and 16 bytes a load, without masks."""
    return (
        operand.shape[1] % 64 == 0
        and operand.stride(1) == 1
        and operand.stride(0) % 16 == 0
        and operand.data_ptr() % 16 == 0
    )


def _config(kind: str, one: Pass, trial: tuning.Trial) -> Config:
    problem, shapes = one.problem, _candidates(kind, one)
    key = " ".join(map(str, (kind, *_device_and_versions(problem.x.device), *one.signature())))
    return tuning.choose(key, shapes, trial, problem.rows * problem.columns, problem.x.device)


@functools.cache
def _device_and_versions(device: torch.device) -> tuple[str, str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name, f"triton {triton.__version__}", f"softclip_kernels {__version__}"


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


def _backward_edge(problem: Problem, launches: list[Pass]) -> int:
    """The largest super-block, in whole tiles of every candidate, whose G fits in the scratch."""
    tile = max(max(c.block_m, c.block_n) for one in launches for c in _candidates("gradient", one))
    buffers = problem.x.element_size() * (1 + launches[0].paired) + 4 * len(launches[:-1][:2])
    return _edge(SCRATCH / buffers, tile, max(problem.rows, problem.columns))


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
