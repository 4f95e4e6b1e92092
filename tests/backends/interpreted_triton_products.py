"""The products with G and the gradients made of them, in Triton's interpreter, against float64. A process of its own
(test_triton_products.py); by hand:

    TRITON_INTERPRET=1 python -m pytest tests/backends/interpreted_triton_products.py
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from softclip_kernels.backends.triton import launch, shapes, tuning
from softclip_kernels.backends.triton.gradients import Gradients
from softclip_kernels.backends.triton.shapes import Shape
from softclip_kernels.problem import Problem
from softclip_kernels.stats import Wanted
from softclip_kernels.testing import unit_rows

EDGE = 64  # two tiles of the interpreter's
ALL = (True, True, True)
WAYS = ("kernel", "library")
PAIRS, LABELS, ABSENT = "pairs", "labels", "absent"


@dataclass(frozen=True)
class Case:
    """A problem with a G of its own, and what float64 makes of it."""

    problem: Problem
    g: Tensor
    coefficient: Tensor | None = None
    unit: Tensor | None = None
    mirrored: bool = False

    @staticmethod
    def of(n: int, m: int, d: int, positives: str | None = LABELS, unit: float = 1.0, mirrored: bool = False) -> Case:
        """positives: pairs, a permutation with some absent, whose rows are known; labels, which rows may share; absent,
        in other blocks; None."""
        generator = torch.Generator().manual_seed(n * m + d)
        x, y = (unit_rows(length, d, seed=seed, dtype=torch.float32) for length, seed in ((n, 1), (m, 2)))
        g = torch.randn(n, m, generator=generator)
        scale, coefficient = torch.tensor(14.3), torch.randn(n, generator=generator)
        if positives == PAIRS:
            column = torch.randperm(max(n, m), generator=generator)[:n] - 1
            inside = (column >= 0) & (column < m)
            row = torch.full((m,), -1).scatter(0, column[inside], torch.arange(n)[inside])
            problem = Problem(x, y, scale, column, positive_row=row)
        elif positives is None:
            return Case(Problem(x, y, scale), g, None, torch.tensor(unit) if unit != 1 else None, mirrored)
        else:
            column = torch.randint(-1, m + 2, (n,), generator=generator) if positives == LABELS else torch.full((n,), m)
            inside = (column >= 0) & (column < m)
            problem = Problem(x, y, scale, column)
        coefficient = torch.where(inside, coefficient, 0.0)
        return Case(problem, g, coefficient, torch.tensor(unit) if unit != 1 else None, mirrored)

    def run(self, needs: tuple[bool, bool, bool] = ALL, rounded: bool = False, edge: int = EDGE) -> list[Tensor | None]:
        """By Gradients, from a scratch that is full of NaN wherever G is not."""
        p = self.problem
        scratch = p.x.new_empty((2, edge, edge) if self.mirrored else (edge, edge))
        gradients = Gradients(p, Wanted(*needs, rounded=rounded), scratch, self.coefficient, self.unit)
        for i, j in launch.super_blocks(p.rows, p.columns, edge, self.mirrored):
            scratch.fill_(torch.nan)
            for g, (rows, columns) in zip(scratch.view(-1, edge, edge), ((i, j), (j, i)), strict=False):
                block = self.g[rows, columns]
                g[: block.shape[0], : block.shape[1]] = block
            gradients.add(i, j)
        return list(gradients.result())

    def exact(self) -> list[Tensor]:
        p, g = self.problem, self.g.double() * (1 if self.unit is None else self.unit.double())
        if self.coefficient is not None:
            inside, column = p.positives_inside()
            g.index_put_((torch.arange(p.rows)[inside], column[inside]), self.coefficient.double()[inside], True)
        x, y, scale = p.x.double(), p.y.double(), p.scale.double()
        return [scale * g @ y, scale * g.T @ x, (x * (g @ y)).sum()]


def assert_accurate(result: list[Tensor | None], exact: list[Tensor], needs: tuple[bool, bool, bool], eps: float = 0):
    """As sums of fp32: a few roundings of the largest entry; `eps`, of the dtype that is rounded to."""
    for found, truth, needed in zip(result, exact, needs, strict=True):
        if not needed:
            assert found is None
            continue
        assert found is not None and found.shape == truth.shape and found.is_contiguous()
        error = (found.double() - truth).abs().max() / truth.abs().max()
        assert error < 3e-6 + eps, error  # seen: 4e-7


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The kernel and torch's products, one after the other."""
    every = shapes.product_candidates(True, 4, "interpreter")
    (chosen,) = (shape for shape in every if (shape.way == shapes.LIBRARY) == (request.param == "library"))
    monkeypatch.setattr(shapes, "product_candidates", lambda *_: (chosen,))
    return request.param


# One tile, less than one, several super-blocks with ragged ends in both directions, widths below and beyond a tile's.
@pytest.mark.parametrize("positives", (PAIRS, LABELS, ABSENT, None))
@pytest.mark.parametrize(("n", "m", "d"), ((1, 1, 1), (64, 64, 32), (150, 97, 40), (33, 200, 70)))
def test_gradients_agree_with_float64(way, n, m, d, positives):
    case = Case.of(n, m, d, positives)
    assert_accurate(case.run(), case.exact(), ALL)


@pytest.mark.parametrize("n", (64, 150))
@pytest.mark.parametrize("positives", (PAIRS, LABELS))
def test_mirrors_are_added_with_their_super_blocks(way, n, positives):
    """Of 150 rows three super-blocks lie on the diagonal and three beside it; of 64 there is one, its own mirror."""
    case = Case.of(n, n, 40, positives, mirrored=True)
    assert_accurate(case.run(), case.exact(), ALL)


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("needs", [needs for needs in product((True, False), repeat=3) if any(needs)])
def test_only_what_is_needed_is_computed(way, needs, mirrored):
    """And has the same bits as beside the others; dscale's follow from dy's sums where x has no gradient, so they
    differ there."""
    case = Case.of(150, 150, 40, mirrored=mirrored)
    result, both = case.run(needs), case.run()
    assert_accurate(result, case.exact(), needs)
    for found, other in list(zip(result, both, strict=True))[: 2 if not needs[0] else 3]:
        assert found is None or torch.equal(found, other)


@pytest.mark.parametrize("positives", (PAIRS, LABELS))
def test_g_may_be_in_a_unit(way, positives):
    """Positives are not."""
    case = Case.of(150, 97, 40, positives, unit=2.0**-9)
    assert_accurate(case.run(), case.exact(), ALL)


def test_strides_are_followed(way):
    """Embeddings with a step along the width, or with rows that overlap, and positives from a column of a matrix."""
    case = Case.of(70, 97, 24)
    x, y = torch.randn(24, 70).T, torch.randn(97 + 23).unfold(0, 24, 1)
    column, coefficient = (torch.stack([v, v + 1], 1)[:, 0] for v in (case.problem.positive_column, case.coefficient))
    case = Case(Problem(x, y, case.problem.scale, column), case.g, coefficient)
    assert_accurate(case.run(), case.exact(), ALL)


def test_results_repeat_whatever_memory_held(way, monkeypatch):
    """Nothing is read before it is written."""
    case = Case.of(150, 97, 40)
    before = case.run()
    new_empty = torch.Tensor.new_empty

    def poisoned(*arguments, **named):
        tensor = new_empty(*arguments, **named)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for found, expected in zip(case.run(), before, strict=True):
        assert torch.equal(found, expected)


def test_timing_the_first_super_block_changes_nothing(way, monkeypatch):
    """However often a candidate adds it."""
    case = Case.of(150, 97, 40)
    before = case.run()

    def choose(kind, key, candidates, trial, entries, device):
        for shape in candidates * 3:
            launched, covered = trial(shape)
            launched()
            assert covered == EDGE * EDGE
        return candidates[0]

    monkeypatch.setattr(tuning, "choose", choose)
    for found, expected in zip(case.run(), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("positives", (PAIRS, LABELS))
def test_gradients_are_rounded_once(positives, mirrored, monkeypatch):
    """In float16: its products are made by torch here, but from the sums on it is the code of every dtype. (To bfloat16
    the interpreter rounds towards 0.) Ranges of rows take turns in one buffer of sums unless mirrors come back."""

    def add_product(total, a, b):
        total += a.float() @ b.float()

    monkeypatch.setattr(shapes, "product_candidates", lambda *_: (Shape(32, 32, 32, 4, 1, shapes.LIBRARY),))
    monkeypatch.setattr(launch, "add_product", add_product)
    case = Case.of(150, 150, 40, positives, mirrored=mirrored)
    p = case.problem
    p = replace(p, x=p.x.half(), y=p.y.half())
    case = replace(case, problem=p, g=case.g.half())
    for needs in (ALL, (True, False, True), (False, True, True), (False, False, True)):
        wide, rounded = case.run(needs), case.run(needs, rounded=True)
        assert_accurate(wide, case.exact(), needs)
        for of_fp32, found in zip(wide[:2], rounded[:2], strict=True):
            assert found is None or torch.equal(found, of_fp32.half())
        assert rounded[2] is None or torch.equal(rounded[2], wide[2])
