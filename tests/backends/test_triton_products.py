"""The products with G on a machine without a GPU: interpreted, their memory, and the edge of their super-blocks."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import interpreter
from helpers.allocations import Allocations
from helpers.backends import needs_triton

from softclip_kernels.problem import Problem
from softclip_kernels.stats import Wanted

pytestmark = needs_triton

MIB = 2**20
PROCESSORS = (80, 108, 114, 132, 148, 160)
WIDTHS = (256, 320, 512, 640, 768, 1024, 1280, 1536, 2048)


def test_the_products_pass_their_tests_interpreted():
    interpreter.assert_kernels_pass(Path(__file__).parent / "interpreted_triton_products.py", 80)


# Memory.


def beyond_gradients(monkeypatch, n, width, needs, rounded, mirrored, inverse):
    """The most bytes that the scratch, the sums and what finishes them take beyond the gradients, in bfloat16 on 132
    multiprocessors. Nothing is launched, and the tensors have no memory."""
    from softclip_kernels.backends.triton import call, launch
    from softclip_kernels.backends.triton.edges import best_edge, memory_for_scratch
    from softclip_kernels.backends.triton.gradients import Gradients

    monkeypatch.setattr(call.Call, "__call__", lambda self, programs, **changing: None)
    x, y = (torch.empty(n, width, dtype=torch.bfloat16, device="meta") for _ in range(2))
    column, coefficient = torch.empty(n, dtype=torch.int64, device="meta"), torch.empty(n, device="meta")
    problem = Problem(x, y, torch.empty((), device="meta"), column, positive_row=column if inverse else None)
    last = 2 * n * width if rounded else 0
    memory = memory_for_scratch(last * (1 + mirrored), last)
    edge = best_edge(work(n, width, mirrored), *shapes_of(mirrored), 132, memory)
    with Allocations(x, y, column, coefficient) as allocations:
        scratch = x.new_empty((2, edge, edge) if mirrored else (edge, edge))
        gradients = Gradients(problem, Wanted(*needs, rounded=rounded), scratch, coefficient)
        del scratch
        for i, j in launch.super_blocks(n, n, edge, mirrored):
            gradients.add(i, j)
        results = gradients.result()[:2]
    assert [result is not None for result in results] == list(needs[:2])
    return allocations.most - sum(result.nbytes for result in results if result is not None)


# The sums that are whole, in gradients of 2 bytes an entry: less the gradient that they become, or all of them.
@pytest.mark.parametrize(
    ("needs", "rounded", "mirrored", "whole"),
    (
        ((True, True, True), True, False, 2),
        ((True, True, True), True, True, 3),
        ((True, True, True), False, False, 0),
        ((True, False, True), True, False, 0),
        ((False, True, False), True, False, 2),
        ((False, False, True), True, False, 0),
    ),
)
@pytest.mark.parametrize("n", (4096, 16384, 32768, 131072))
def test_memory_beyond_the_gradients_is_bounded(monkeypatch, n, needs, rounded, mirrored, whole):
    """By the limit, 64 MiB at a width of 512 and up to 32768 rows, unless mirrored, and by the sums beyond; whether
    positives are gathered or scattered. The few vectors that come on top are partial sums of dscale, a quarter of a
    byte a row."""
    for limit, inverse in product((64, 384), (True, False)):
        monkeypatch.setenv("SOFTCLIP_GPU_MIB", str(limit))
        beyond = beyond_gradients(monkeypatch, n, 512, needs, rounded, mirrored, inverse)
        assert beyond <= max(limit * MIB, whole * 2 * 512 * n) + n


@pytest.mark.parametrize("value", ("0", "1", "-5", "2.5", "much"))
def test_a_limit_that_is_none_is_refused(monkeypatch, value):
    from softclip_kernels.backends.triton.edges import most

    monkeypatch.setenv("SOFTCLIP_GPU_MIB", value)
    with pytest.raises(ValueError, match=f"SOFTCLIP_GPU_MIB='{value}'; allowed: a number of MiB from 2 on"):
        most()


# The edge.


def shapes_of(mirrored):
    from softclip_kernels.backends.triton.shapes import candidates, product_candidates

    mode = "transposed" if mirrored else "none"
    return candidates("backward", mode, True, 2, "sm_90"), product_candidates(True, 2, "sm_90")


def work(n, width, mirrored=False):
    from softclip_kernels.backends.triton.edges import Work

    return Work(n, n, width, width * (1 + mirrored), 2, mirrored, *((4, 0) if mirrored else (2, 4 * width)))


def share(task, edge, mirrored, processors):
    """Of the rate of products that the model gives to the backward pass."""
    from softclip_kernels.backends.triton.edges import modelled_time

    products = task.rows * task.columns * (task.g_width + task.products * task.width)
    return products / processors / modelled_time(task, edge, *shapes_of(mirrored), processors)


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("width", WIDTHS)
def test_the_best_edge_keeps_the_memory_and_fills_the_multiprocessors(width, mirrored):
    """Never worse than the longest edge that the memory holds, and in large problems at no less than a share of the
    rate, whatever the number of multiprocessors."""
    from softclip_kernels.backends.triton.edges import best_edge, memory_for_scratch

    bound = 0.34 if width < 512 else 0.39 if width < 768 else 0.54
    for processors, n in product(PROCESSORS, (1000, 8192, 32768, 100_000)):
        task, memory = work(n, width, mirrored), memory_for_scratch(2 * n * width * (1 + mirrored), 2 * n * width)
        edge = best_edge(task, *shapes_of(mirrored), processors, memory)
        tile = 128 if mirrored else 256
        assert edge % tile == 0 and edge < n + tile and task.memory(edge) <= memory
        longest = max(other for other in range(tile, n + tile, tile) if task.memory(other) <= memory)
        reached = share(task, edge, mirrored, processors)
        assert reached >= share(task, longest, mirrored, processors)
        assert reached >= bound or n < 32768


def test_edges_of_known_problems():
    """On 132 multiprocessors: 128 tiles of 128 x 256 make one wave of both products at width 512 and edge 4096, where
    the memory holds it; where it does not, 104 of an edge of 3328 do best."""
    from softclip_kernels.backends.triton.edges import best_edge

    def edge(width, memory, mirrored=False):
        return best_edge(work(32768, width, mirrored), *shapes_of(mirrored), 132, memory * MIB)

    assert (edge(512, 40), edge(512, 32)) == (4096, 3328)
    assert (edge(768, 32), edge(1024, 32)) == (2816, 2048)
    assert edge(512, 32, mirrored=True) == 2048
    assert edge(512, 0) == 256  # one tile at least
