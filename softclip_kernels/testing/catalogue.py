"""Every kind of target, made for a batch of any size: what each backend must compute, and a new one, too.

target = ALL_TARGETS["psd"](n, m)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..targets import (
    Average,
    Blocks,
    Dense,
    Hard,
    Mix,
    Potentials,
    ProgressiveSelfDistillation,
    Ratio,
    SelfTeacher,
    Sinkhorn,
    Target,
    Teacher,
    Weighted,
    schedules,
)
from .problems import matching_rows, unit_rows

TargetMaker = Callable[[int, int], Target]


def _teacher(n: int, m: int, seed: int = 7, width: int = 24, scale: float | Ratio = 9.0, **options: object) -> Teacher:
    """One that knows the pairs, where there are pairs."""
    a = unit_rows(n, width, seed=seed)
    b = matching_rows(a, seed=seed + 1) if n == m else unit_rows(m, width, seed=seed + 1)
    return Teacher(a.float(), b.float(), scale, **options)  # type: ignore[arg-type]


def _fractions(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def _integers(n: int, below: int, seed: int) -> torch.Tensor:
    return torch.randint(below, (n,), generator=torch.Generator().manual_seed(seed))


def _psd(n: int, **options: object) -> Target:
    return ProgressiveSelfDistillation(schedules.Constant(0.4), seed=3, **options).at(11, n)  # type: ignore[arg-type]


def _segments(n: int) -> torch.Tensor:
    return torch.arange(n) % 2 if n > 1 else torch.zeros(n, dtype=torch.int64)


# Targets that pair row i with column i, for square batches.
SQUARE_TARGETS: dict[str, TargetMaker] = {
    "hard": lambda n, m: Hard(),
    "smoothing": lambda n, m: Hard(smoothing=0.1),
    "blend_self": lambda n, m: Mix(Hard(), SelfTeacher(), 0.3),
    "blend_self_own_scale": lambda n, m: Mix(Hard(), SelfTeacher(5.0), 0.3),
    "self_sinkhorn": lambda n, m: Mix(Hard(), SelfTeacher(normalise="sinkhorn"), 0.5),
    "paired_column": lambda n, m: Mix(Hard(), SelfTeacher(10.0, "paired", normalise="column"), 0.5),
    "psd": lambda n, m: _psd(n),
    "psd_own_scale": lambda n, m: _psd(n, teacher_scale=20.0),
    "psd_no_swap": lambda n, m: _psd(n, swap="none", teacher_scale=30.0),
    "psd_ratio": lambda n, m: _psd(n, swap="none", teacher_scale=Ratio(2.0)),
    "psd_smoothing_sinkhorn": lambda n, m: _psd(n, hard=Hard(smoothing=0.1), normalise="sinkhorn"),
    "psd_block": lambda n, m: _psd(n, scope="block"),
    "psd_external": lambda n, m: _psd(n, teacher=_teacher(n, m)),
    "psd_several": lambda n, m: _psd(n, teacher=(_teacher(n, m), _teacher(n, m, seed=17, width=5))),
    "psd_several_block": lambda n, m: _psd(n, scope="block", teacher=(_teacher(n, m), _teacher(n, m, seed=17))),
    "weighted": lambda n, m: Weighted(_psd(n), (_fractions(n, 1) + 0.5, _fractions(m, 2) + 0.5)),
}

# Targets for any N and M.
RECTANGULAR_TARGETS: dict[str, TargetMaker] = {
    "labels": lambda n, m: Hard(_integers(n, m, 4)),
    "labels_smoothing": lambda n, m: Hard(_integers(n, m, 4), smoothing=0.2),
    "groups": lambda n, m: Hard(groups=(_integers(n, 9, 5), _integers(m, 9, 6))),
    "groups_smoothing": lambda n, m: Hard(groups=(_integers(n, 9, 5), _integers(m, 9, 6)), smoothing=0.3),
    "dense": lambda n, m: Dense(unit_rows(n, m, seed=8).abs()),
    "dense_both": lambda n, m: Dense(unit_rows(n, m, seed=8).abs(), unit_rows(n, m, seed=9).abs()),
    "teacher": lambda n, m: _teacher(n, m),
    "teacher_ratio": lambda n, m: _teacher(n, m, scale=Ratio(0.5)),
    "teacher_column": lambda n, m: _teacher(n, m, normalise="column"),
    "teacher_sinkhorn": lambda n, m: _teacher(n, m, normalise=Sinkhorn(3)),
    "teacher_potentials": lambda n, m: _teacher(
        n, m, normalise=Potentials(-2 * _fractions(n, 10), torch.where(_fractions(m, 11) < 0.3, -torch.inf, -1.0))
    ),
    "blend_vectors": lambda n, m: Mix(
        Hard(_integers(n, m, 4), 0.1), _teacher(n, m), (_fractions(n, 12), _fractions(m, 13))
    ),
    "two_indices": lambda n, m: Average([Hard(_integers(n, m, 4)), Hard(_integers(n, m, 14))], (1.0, 3.0)),
    "blocks_column": lambda n, m: Blocks(_teacher(n, m, normalise="column"), _segments(n) * 2, _segments(m)),
    "blocks_sinkhorn": lambda n, m: Blocks(_teacher(n, m, normalise="sinkhorn"), _segments(n), _segments(m) * 3),
    "blocks": lambda n, m: Blocks(Average([_teacher(n, m), SelfTeacher(8.0)]), _segments(n), _segments(m)),
}

ALL_TARGETS = SQUARE_TARGETS | RECTANGULAR_TARGETS
