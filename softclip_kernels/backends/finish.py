"""What follows the two matrix products of a backward pass, for backends whose kernels end with them."""

from __future__ import annotations

from torch import Tensor

from .. import positives
from ..indexing import row_slices
from ..problem import Problem
from ..stats import InputGradients, Statistics, StatisticsGradient, Wanted

Products = tuple[Tensor | None, Tensor | None]


def gradients(
    problem: Problem, statistics: Statistics, gradient: StatisticsGradient, wanted: Wanted, products: Products
) -> InputGradients:
    """From `products`, G @ y (N, D) and G.T @ x (M, D) in the accumulation dtype without the positives' entries, None
    where `wanted` takes none. They are overwritten, and released one after the other as they are rounded."""
    gx, gy = products
    del products
    if problem.positive_column is not None:
        positives.add_gradient(problem, positives.gradient(problem, statistics, gradient), gx, gy)
    dscale = None
    if wanted.scale:
        dscale = _inner_product(problem.x, gx) if gx is not None else _inner_product(problem.y, gy)
    dx = gx.mul_(problem.scale) if gx is not None and wanted.x else None
    del gx
    dy = gy.mul_(problem.scale) if gy is not None else None
    del gy
    if wanted.rounded:
        dx = None if dx is None else dx.to(problem.x.dtype)
        dy = None if dy is None else dy.to(problem.y.dtype)
    return InputGradients(dx, dy, dscale)


def _inner_product(embedding: Tensor, product: Tensor | None) -> Tensor:
    """`sum_i x_i · (G y)_i`, or the same of y and `G.T @ x`: the gradient of the scale."""
    assert product is not None
    total = product.new_zeros(())
    for part in row_slices(embedding):
        total += (embedding[part] * product[part]).sum()
    return total
