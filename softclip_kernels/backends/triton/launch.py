"""What the launches of a problem have in common: super-blocks, tile shapes, precision, sums of matrix products."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ... import precision
from ...problem import Problem
from ...version import __version__
from ..cuda import kernels
from . import shapes, tuning
from .call import ceil_div
from .passes import Pass, smooth
from .shapes import Shape

logger = logging.getLogger("softclip_kernels")

SCRATCH = 32 * 2**20  # bytes of partial sums in the forward pass


def super_blocks(n: int, m: int, edge: int, mirrored: bool) -> Iterator[tuple[slice, slice]]:
    """Row and column ranges; mirrored: only those on and above the diagonal."""
    for row_start in range(0, n, edge):
        i = slice(row_start, min(row_start + edge, n))
        for column_start in range(row_start if mirrored else 0, m, edge):
            yield i, slice(column_start, min(column_start + edge, m))


def bounds(i: slice, j: slice) -> dict[str, int]:
    return {"row_start": i.start, "row_end": i.stop, "column_start": j.start, "column_end": j.stop}


def entries(i: slice, j: slice) -> int:
    return (i.stop - i.start) * (j.stop - j.start)


def tiles(part: slice, block: int) -> int:
    return ceil_div(part.stop - part.start, block)


def over(shape: Shape, i: slice, j: slice) -> dict[str, int]:
    """What a kernel with a program for every tile takes of the super-block (i, j)."""
    return {"programs": tiles(i, shape.block_m) * tiles(j, shape.block_n), **bounds(i, j)}


def forward_edge(shape: Shape, statistics: int, mirrored: bool, longest: int) -> int:
    """Of super-blocks in whole tiles, as few and as equal as their partial sums in the scratch allow."""
    tile = max(shape.block_m, shape.block_n)
    per_entry = 4 * statistics * (1 + mirrored) * (1 / shape.block_m + 1 / shape.block_n)
    number = ceil_div(longest, largest_edge(SCRATCH / per_entry, tile, longest))
    return tile * ceil_div(ceil_div(longest, number), tile)


def largest_edge(area: float, tile: int, longest: int) -> int:
    """Of a square of `area` entries at most, in whole tiles, and not beyond the problem's longest side."""
    return min(max(int(area**0.5) // tile, 1), ceil_div(longest, tile)) * tile


def candidates(kind: str, launch_pass: Pass) -> tuple[Shape, ...]:
    """The shapes that suit a pass, the CUDA kernels' last; kind: forward, online or backward."""
    unsuitable = shapes.UNBIASED if launch_pass.biased else frozenset()
    if not launch_pass.student:  # a later teacher's launch, with no student's part to split off
        unsuitable |= {shapes.SPLIT}
    if launch_pass.overlapping:  # a descriptor's rows do not
        unsuitable |= {shapes.TMA}
    suitable = _suitable(kind, launch_pass.case, architecture(launch_pass.problem.x.device), unsuitable)
    if not _offers_sm90(kind, launch_pass):
        return suitable
    return *suitable, shapes.SM90_PAIR if kind == "forward" and launch_pass.taught else shapes.SM90_SHAPE


def _offers_sm90(kind: str, launch_pass: Pass) -> bool:
    """Whether the CUDA kernels are worth their compilation, and can run."""
    problem = launch_pass.problem
    if architecture(problem.x.device) != shapes.SM90_ARCHITECTURE and not kernels.forced():  # then the reason is raised
        return False
    named = shapes.SM90 in os.environ.get(tuning.CANDIDATE, "")
    if not (named or kernels.forced() or tuning.times(problem.rows * problem.columns)):
        return False
    from . import sm90  # here, because it needs this module

    return sm90.why_not(kind, launch_pass) is None


@functools.cache
def _suitable(kind: str, case: tuple[str, bool, int], device: str, unsuitable: frozenset[str]) -> tuple[Shape, ...]:
    return tuple(shape for shape in shapes.candidates(kind, *case, device) if shape.way not in unsuitable)


def choose_shape(kind: str, launch_pass: Pass, trial: tuning.Trial) -> Shape:
    problem, suitable = launch_pass.problem, candidates(kind, launch_pass)
    if kernels.forced() and suitable[-1].way == shapes.SM90:
        return suitable[-1]

    def case() -> str:
        return _case(problem.x.device, launch_pass.signature())

    return tuning.choose(kind, case, suitable, trial, problem.rows * problem.columns, problem.x.device)


@functools.cache
def _case(device: torch.device, decisive: tuple[Any, ...]) -> str:
    """For which the fastest shape is remembered: the GPU, the versions, and what decides beside them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return " ".join(map(str, (name, f"triton {triton.__version__}", f"softclip_kernels {__version__}", *decisive)))


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_90, gfx942, ...; "interpreter" on the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs of large tiles run at once: a GPU's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def constants(launch_pass: Pass, shape: Shape) -> dict[str, Any]:
    """The constants of every kernel with tiles."""
    teacher_x = launch_pass.problem.x if launch_pass.teacher_x is None else launch_pass.teacher_x
    return {
        "STUDENT": launch_pass.student,
        "TEACHER": launch_pass.mode,
        "EVEN": launch_pass.problem.x.shape[1] % shape.block_d == 0,
        "TEACHER_EVEN": teacher_x.shape[1] % shape.block_d == 0,
        "PRECISION": _precision(launch_pass.problem.x, launch_pass.problem.row_threshold is not None),
        "TEACHER_PRECISION": _precision(teacher_x),
        **shape.constants(),
    }


def _precision(operand: Tensor, ranked: bool = False) -> str:
    """How fp32 operands are multiplied: in three tf32 products, or one where torch's settings allow it, as torch's own
    products in the backward pass do; not where ranks are counted, because one rounds more than their thresholds allow
    for. Other operands have one way."""
    if operand.dtype == torch.float32 and operand.is_cuda:
        if not ranked and precision.rounds_operands(operand.device):
            return "tf32"
        return "ieee" if torch.version.hip else "tf32x3"
    return "ieee"


def unit(dtype: torch.dtype, grad_rows: Tensor, grad_columns: Tensor) -> Tensor | None:
    """float16 holds nothing below 6e-8, and an entry of G is a probability over twice the batch: gradients are taken in
    a unit (0-d) in which the largest is 2^12, and smaller ones keep 36 more powers of two. None for other dtypes."""
    if dtype != torch.float16:
        return None
    peak = torch.maximum(grad_rows.abs().max(), grad_columns.abs().max())
    return torch.where((peak > 0) & peak.isfinite(), peak / 2.0**12, 1.0)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, total fp32, accumulated in fp32 whatever the operands are."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif _adds_in_place(a.dtype, a.device):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b, out_dtype=torch.float32)


_in_place: dict[tuple[torch.dtype, torch.device], bool] = {}


def _adds_in_place(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds a product of 16-bit matrices to an fp32 sum in place. Some versions want the sum in the
    operands' dtype; a temporary, at twice the traffic on the sum, serves there, and where a CUDA graph is captured
    before it was tried."""
    if (dtype, device) not in _in_place:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        _in_place[dtype, device] = _added_in_place(dtype, device)
    return _in_place[dtype, device]


def _added_in_place(dtype: torch.dtype, device: torch.device) -> bool:
    """Tries it, on 2^24 + 3 * 3 * 16, which only fp32 holds. Waits for the GPU."""
    total = torch.full((16, 16), 2.0**24, dtype=torch.float32, device=device)
    a = torch.full((16, 16), 3.0, dtype=dtype, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        logger.info("triton backend: sums of gradients take a temporary (%s)", str(error).split("\n")[0])
        return False
    return bool((total == 2.0**24 + 144).all())


def product_candidates(problem: Problem) -> tuple[Shape, ...]:
    """The shapes that suit the products with G."""
    plain = smooth(problem.x) and smooth(problem.y)
    return shapes.product_candidates(plain, problem.x.element_size(), architecture(problem.x.device))


def choose_product_shape(problem: Problem, mirrored: bool, needed: list[str], trial: tuning.Trial) -> Shape:
    """For the products with G; `needed`: whose gradients they are, x or y or both."""
    suitable = product_candidates(problem)

    def case() -> str:
        products = (*needed, *(["mirrored"] if mirrored else []), problem.x.dtype, problem.x.shape[1])
        return _case(problem.x.device, products)

    return tuning.choose("products", case, suitable, trial, problem.rows * problem.columns, problem.x.device)
