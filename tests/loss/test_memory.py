"""The loss's peak memory is the published formula, within 10 %, hence linear in N. Measured from inside a process that
has grown, as a test worker has; and the measurement notices a regression."""

from __future__ import annotations

import sys

import pytest
from helpers import memory
from helpers.backends import needs_cpu_kernels

from softclip_kernels.backends import cpu

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")

MIB = 1 << 20
THREADS = 2  # of the CPU kernels
KEPT_WORKSPACE = 16 * MIB  # of theirs, between calls
BLOCK = {"avx2": 240}  # of the CPU levels; 224 at the others
TARGETS = ("hard", "psd", "psd_external")  # no teacher, a self teacher of the swapped pair, one with own embeddings
TEACHER_WIDTH = 24  # conftest's


@pytest.fixture(scope="module", autouse=True)
def grown():
    """A gigabyte more than any measured loss needs, in this process."""
    pages = bytearray(1 << 30)
    pages[::4096] = b"x" * len(range(0, 1 << 30, 4096))
    return pages


def chunked_formula(n: int, width: int, target: str) -> int:
    """docs/design.md, section 4: the gradients in float32, and blocks of 1024 x 1024, float32 and one of bools."""
    return 2 * n * width * 4 + 1024**2 * (4 * (5 if target == "hard" else 6) + 1)


def cpu_formula(n: int, width: int, target: str, pairs: bool) -> int:
    """docs/cpu.md, section Memory. `pairs`: bfloat16 at a level that multiplies it."""
    block, size, sides = BLOCK.get(cpu.level(), 224), 2 if pairs else 4, 2 if target == "psd" else 1
    teacher = TEACHER_WIDTH if target == "psd_external" else 0
    kept = kept_formula(n, block, sides, products=2 if teacher else 1)
    # Kept logits take the place of their operands' panels and of dots, whose place G would have taken.
    panels = sides * size * block * (width if kept else 2 * width + teacher)
    group = max(1, min(10 * MIB, 20 * MIB // THREADS) // panels)
    blocks = -(-(n // (sides * THREADS)) // block)
    squares = sides * block**2 * (4 if kept or not teacher else 12) + (4 * block**2 if pairs else 0)
    working = (min(group, blocks) + 1) * panels + sides * 4 * block * width + squares
    stayed = min(THREADS * working, KEPT_WORKSPACE)  # from a call before
    return 2 * n * width * 4 + THREADS * working - stayed + kept


def kept_formula(n: int, block: int, sides: int, products: int) -> int:
    """All logits, and those of the blocks on the diagonal twice where they are their own mirrors."""
    kept = 4 * products * n * (n + (sides - 1) * block)
    return kept if kept <= cpu.KEPT_MIB * MIB else 0


def assert_follows(growth: list[int], formula: list[int]) -> None:
    """Each within 10 %; and so is what a larger N adds, where a constant cannot hide a square. (A temporary of 1 MiB
    that was still resident before one of the two is not a square.)"""
    for got, expected in zip(growth, formula, strict=True):
        assert got == pytest.approx(expected, rel=0.1), f"{growth} {formula}"
    added, expected = (values[-1] - values[0] for values in (growth, formula))
    assert added == pytest.approx(expected, rel=0.1, abs=1.5 * MIB), f"{growth} {formula}"


def measure_chunked(targets: tuple[str, ...], sizes: list[int], **options: object) -> dict[str, list[int]]:
    cases = [(target, "float32") for target in targets]
    return memory.in_a_new_process("loss_growth", "chunked", cases, sizes, 512, 1, **options)


def test_chunked():
    sizes = [2048, 2560, 3072]  # two whole blocks and more
    for case, growth in measure_chunked(TARGETS, sizes).items():
        assert_follows(growth, [chunked_formula(n, 512, case.split()[0]) for n in sizes])


def test_chunked_as_the_allocator_keeps_it():
    """With glibc's own settings what was freed may stay: up to 18 blocks in all, as docs/design.md says."""
    (growth,) = measure_chunked(("psd",), [2048], allocator={})["psd float32"]
    assert growth <= 1.1 * (2 * 2048 * 512 * 4 + 18 * 4 * 1024**2)


# Widths at which a thread's share of the rows fills its group of packed blocks from the first size on.
@needs_cpu_kernels
@pytest.mark.parametrize(("dtype", "width", "targets"), (("float32", 2048, TARGETS), ("bfloat16", 4096, ("psd",))))
def test_cpu(dtype, width, targets):
    sizes = [1024, 2048, 3072]
    cases = [(target, dtype) for target in targets]
    pairs = dtype == "bfloat16" and cpu.level() == "avx512bf16"
    measured = memory.in_a_new_process("loss_growth", "cpu", cases, sizes, width, THREADS)
    for case, growth in measured.items():
        assert_follows(growth, [cpu_formula(n, width, case.split()[0], pairs) for n in sizes])


# Regressions: a doubled block, operands copied whole, one byte for each pair.
LARGER_BLOCK = "from softclip_kernels.backends import chunked; chunked.BLOCK['cpu'] *= 2"
COPIED_OPERANDS = """
from dataclasses import replace
from softclip_kernels.backends import cpu
bound = cpu._bound
cpu._bound = lambda problem: bound(replace(problem, x=problem.x.clone(), y=problem.y.clone()))
"""
ALL_PAIRS = """
import torch
from softclip_kernels.backends import cpu
backward = cpu.CpuBackend._backward
def with_a_mask(backend, problem, *arguments):
    mask = torch.ones(problem.rows, problem.columns, dtype=torch.bool)
    return backward(backend, problem, *arguments)
cpu.CpuBackend._backward = with_a_mask
"""


def test_a_regression_of_chunked_is_seen():
    sizes = [2048, 2560]
    (growth,) = measure_chunked(("hard",), sizes, plant=LARGER_BLOCK).values()
    with pytest.raises(AssertionError):
        assert_follows(growth, [chunked_formula(n, 512, "hard") for n in sizes])


@needs_cpu_kernels
@pytest.mark.parametrize("plant", (COPIED_OPERANDS, ALL_PAIRS), ids=("copied operands", "all pairs"))
def test_a_regression_of_the_cpu_backend_is_seen(plant):
    sizes = [2560, 3072]  # of which nothing is kept
    (growth,) = memory.in_a_new_process(
        "loss_growth", "cpu", [("hard", "float32")], sizes, 2048, THREADS, plant=plant
    ).values()
    with pytest.raises(AssertionError):
        assert_follows(growth, [cpu_formula(n, 2048, "hard", pairs=False) for n in sizes])
