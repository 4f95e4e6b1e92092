"""Embeddings to compute a loss on, with as much signal as a test needs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import accumulation_dtype


def unit_rows(n: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """(n, d) random rows of unit norm; the same values in every dtype, up to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(device, dtype)


def matching_rows(x: Tensor, *, noise: float = 0.5, seed: int = 1) -> Tensor:
    """Rows that resemble x's, as a trained text encoder's would: unit norm, x's shape, dtype and device."""
    other = unit_rows(*x.shape, seed=seed, device=str(x.device))
    return F.normalize(x.double() + noise * other, dim=1).to(x.dtype)


def contested_cosine(n: int, d: int, scale: float) -> float:
    """The cosine of pairs at which each weighs, at this logit scale, about as much as the other n - 1 rows together,
    all of which are independent, of unit norm and of width d: the log-sum-exp of logits of standard deviation
    s = scale / sqrt(d), which is log n + s^2 / 2 or, where few of them dominate, their largest, over the scale."""
    s, few = scale / d**0.5, (2 * math.log(max(n, 2))) ** 0.5
    log_sum_exp = math.log(n) + s**2 / 2 if s < few else s * few
    return min(log_sum_exp / scale, 0.9)


def contested_rows(x: Tensor, scale: float, *, seed: int = 1) -> Tensor:
    """Rows that resemble x's only as much as it takes for each pair to weigh, at this logit scale, about as much as all
    others of its row and of its column together (`contested_cosine`, but row by row); x's shape, dtype and device.

    The loss is then of order 1 and no gradient is near 0, at every scale: the larger it is, the less alike are pairs.
    With rows that match (`matching_rows`) a loss is 1e-3 at scale 14.3 and 0 at 100, and a kernel that returns no
    gradient at all is hard to tell from one that is right. O(N^2 D) work, O(N) memory.
    """
    wide = x.double()
    wide = wide / wide.norm(dim=1, keepdim=True)
    other = unit_rows(*x.shape, seed=seed, device=str(x.device))
    if x.shape[1] > 1:  # orthogonal to x's, so that the cosine of a pair is what it is set to
        other = F.normalize(other - (other * wide).sum(1, keepdim=True) * wide, dim=1)
    cosine = wide.new_full((len(x), 1), contested_cosine(x.shape[0], x.shape[1], scale))
    for _ in range(5):  # the others' weight hardly depends on the cosines: this settles within a few percent
        y = cosine * wide + (1 - cosine**2).sqrt() * other
        weight = 0.5 * (_log_sum_exp_of_others(wide, y, scale) + _log_sum_exp_of_others(y, wide, scale))
        cosine = (weight / scale).clamp(-0.9, 0.9)[:, None]
    return (cosine * wide + (1 - cosine**2).sqrt() * other).to(x.dtype)


def _log_sum_exp_of_others(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """(N,) log sum over j != i of exp(scale x_i . y_j), some rows at a time."""
    parts = []
    for start in range(0, len(x), 1024):
        z = scale * x[start : start + 1024] @ y.T
        z.diagonal(start).fill_(-torch.inf)
        parts.append(z.logsumexp(1))
    return torch.cat(parts)


def operands(
    n: int, m: int, d: int, *, dtype: torch.dtype = torch.float32, scale: float = 14.3, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, d) and y (m, d), contested where n == m, and the scale in the accumulation dtype."""
    x = unit_rows(n, d, seed=n + d, dtype=dtype, device=device)
    y = contested_rows(x, scale) if n == m else unit_rows(m, d, seed=m + d + 1, dtype=dtype, device=device)
    return x, y, torch.tensor(scale, dtype=accumulation_dtype(dtype), device=device)
