"""Every bad input has an error that names the value and what is allowed, before any compute."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from softclip_kernels import (
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
    SoftClipLoss,
    Teacher,
    Weighted,
    backends,
    partition,
    schedules,
    softclip_loss,
)
from softclip_kernels.testing import unit_rows

X, Y = unit_rows(6, 4, dtype=torch.float32), unit_rows(6, 4, seed=1, dtype=torch.float32)
SCALE = torch.tensor(10.0)
SEGMENTS = (torch.arange(6), torch.arange(6))


def psd(**options):
    return ProgressiveSelfDistillation(schedules.Constant(0.5), **options).at(0, 6)


def psd_of(step, n):
    return ProgressiveSelfDistillation(schedules.Constant(0.5)).at(step, n)


BAD_CALLS = {
    "not a tensor": (lambda: softclip_loss([[1.0]], Y, SCALE), TypeError, "x must be a torch.Tensor"),
    "one dimension": (lambda: softclip_loss(X[0], Y, SCALE), ValueError, "not shape (4,)"),
    "integers": (lambda: softclip_loss(X.long(), Y.long(), SCALE), TypeError, "dtype torch.int64; allowed"),
    "widths": (lambda: softclip_loss(X, Y[:, :3], SCALE), ValueError, "not 4 and 3"),
    "width 0": (lambda: softclip_loss(X[:, :0], Y[:, :0], SCALE), ValueError, "width 0"),
    "dtypes": (lambda: softclip_loss(X, Y.bfloat16(), SCALE), TypeError, "y.to(x.dtype)"),
    "devices": (lambda: softclip_loss(X, Y.to("meta"), SCALE), ValueError, "y on meta"),
    "no rows": (lambda: softclip_loss(X[:0], Y, SCALE, Hard(torch.zeros(0, dtype=torch.long))), ValueError, "0 rows"),
    "scale of words": (lambda: softclip_loss(X, Y, "10"), TypeError, "a number or a tensor of one element"),
    "scale of a truth": (lambda: softclip_loss(X, Y, True), TypeError, "not bool"),
    "number as a scale": (lambda: softclip_loss(X, Y, -10), ValueError, "logit_scale=-10.0 must lie in"),
    "vector scale": (lambda: softclip_loss(X, Y, torch.ones(2)), ValueError, "shape (2,)"),
    "negative scale": (lambda: softclip_loss(X, Y, -SCALE), ValueError, "logit_scale is -10.0"),
    "zero scale": (lambda: softclip_loss(X, Y, 0 * SCALE), ValueError, "logit_scale is 0.0"),
    "sparse": (lambda: softclip_loss(X.to_sparse(), Y, SCALE), TypeError, "x has layout torch.sparse_coo"),
    "no target": (lambda: softclip_loss(X, Y, SCALE, torch.arange(6)), TypeError, "not Tensor"),
    "target by name": (lambda: SoftClipLoss("hard"), TypeError, "target must be a target"),
    "psd without a step": (
        lambda: softclip_loss(X, Y, SCALE, ProgressiveSelfDistillation(schedules.Constant(0.5))),
        TypeError,
        "call its at(step, n)",
    ),
    "mixture of what": (lambda: Mix(Hard(), None, 0.5), TypeError, "soft must be a target"),
    "reduction": (lambda: softclip_loss(X, Y, SCALE, reduction="avg"), ValueError, "reduction='avg'"),
    "module reduction": (lambda: SoftClipLoss(reduction="avg"), ValueError, "reduction='avg'"),
    "backend": (lambda: softclip_loss(X, Y, SCALE, backend="cuda"), ValueError, "backend='cuda' is not known"),
    "diagonal": (lambda: softclip_loss(X, Y[:4], SCALE), ValueError, "not 6 and 4"),
    "smoothing": (lambda: Hard(smoothing=1.5), ValueError, "smoothing=1.5 must lie in [0, 1]"),
    "local without labels": (lambda: Hard(local=True), ValueError, "local=True says how labels count columns"),
    "labels and groups": (lambda: Hard(torch.arange(6), groups=(Y, Y)), ValueError, "not both"),
    "label list": (lambda: softclip_loss(X, Y, SCALE, Hard([0, 1])), TypeError, "labels must be a torch.Tensor"),
    "label dtype": (lambda: softclip_loss(X, Y, SCALE, Hard(torch.ones(6))), TypeError, "labels has dtype"),
    "label count": (lambda: softclip_loss(X, Y, SCALE, Hard(torch.arange(5))), ValueError, "labels has shape (5,)"),
    "label range": (lambda: softclip_loss(X, Y, SCALE, Hard(torch.arange(6) + 1)), ValueError, "holds 1 to 6"),
    "negative label": (lambda: softclip_loss(X, Y, SCALE, Hard(torch.arange(6) - 1)), ValueError, "holds -1 to 4"),
    "group count": (
        lambda: softclip_loss(X, Y, SCALE, Hard(groups=(torch.arange(5), torch.arange(6)))),
        ValueError,
        "groups of the rows has shape (5,)",
    ),
    "group dtype": (
        lambda: softclip_loss(X, Y, SCALE, Hard(groups=(X[:, 0], Y[:, 0]))),
        TypeError,
        "groups of the rows",
    ),
    "dense shape": (lambda: softclip_loss(X, Y, SCALE, Dense(torch.ones(6, 5))), ValueError, "allowed: (6, 6)"),
    "dense negative": (lambda: softclip_loss(X, Y, SCALE, Dense(-torch.ones(6, 6))), ValueError, "not negative"),
    "dense nan": (lambda: softclip_loss(X, Y, SCALE, Dense(torch.full((6, 6), torch.nan))), ValueError, "finite"),
    "alpha": (lambda: Mix(Hard(), SelfTeacher(), 1.5), ValueError, "alpha=1.5"),
    "alpha nan": (lambda: Mix(Hard(), SelfTeacher(), float("nan")), ValueError, "alpha=nan"),
    "alpha values": (lambda: Mix(Hard(), SelfTeacher(), X[:, 0] - 2), ValueError, "alpha must lie in [0, 1]"),
    "alpha list": (lambda: Mix(Hard(), SelfTeacher(), [0.5]), TypeError, "alpha must be a number"),
    "alpha shape": (
        lambda: softclip_loss(X, Y, SCALE, Mix(Hard(), SelfTeacher(), torch.zeros(5))),
        ValueError,
        "alpha of the rows has shape (5,)",
    ),
    "alpha rectangular": (
        lambda: softclip_loss(X, Y[:4], SCALE, Mix(Hard(torch.zeros(6).long()), SelfTeacher(), torch.zeros(6))),
        ValueError,
        "not 6 and 4",
    ),
    "teacher rows": (lambda: softclip_loss(X, Y, SCALE, Teacher(X[:3], Y, 1.0)), ValueError, "teacher a has 3 rows"),
    "teacher widths": (lambda: softclip_loss(X, Y, SCALE, Teacher(X, Y[:, :2], 1.0)), ValueError, "not 4 and 2"),
    "teacher scale": (lambda: softclip_loss(X, Y, SCALE, Teacher(X, Y, -1.0)), ValueError, "teacher scale=-1.0"),
    "teacher scale tensor": (
        lambda: softclip_loss(X, Y, SCALE, Teacher(X, Y, torch.tensor(-1.0))),
        ValueError,
        "teacher scale is -1.0",
    ),
    "teacher scale of none": (lambda: Teacher(X, Y, None), TypeError, "teacher scale must be a number"),
    "self scale negative": (lambda: SelfTeacher(-1.0), ValueError, "scale=-1.0"),
    "normalise": (lambda: Teacher(X, Y, 1.0, normalise="rows"), ValueError, "normalise='rows'"),
    "ratio": (lambda: Ratio(0.0), ValueError, "ratio=0.0 must lie in"),
    "ratio of tensors": (lambda: Ratio(SCALE), TypeError, "ratio must be a number"),  # type: ignore[arg-type]
    "swap": (lambda: SelfTeacher(swap="pair"), ValueError, "swap='pair'"),
    "self scale": (lambda: SelfTeacher("own"), ValueError, "scale='own'"),
    "swap rectangular": (lambda: softclip_loss(X, Y[:4], SCALE, SelfTeacher(swap="paired")), ValueError, "6 and 4"),
    "sinkhorn": (lambda: Sinkhorn(0), ValueError, "iterations=0"),
    "potentials": (
        lambda: softclip_loss(X, Y, SCALE, SelfTeacher(normalise=Potentials(torch.zeros(5), torch.zeros(6)))),
        ValueError,
        "row potential has shape (5,)",
    ),
    "potential values": (
        lambda: Potentials(torch.zeros(6), torch.full((6,), torch.inf)),
        ValueError,
        "column potential must be finite or -inf",
    ),
    "no targets": (lambda: Average([]), ValueError, "at least one"),
    "weights": (lambda: Average([Hard()], [1.0, 2.0]), ValueError, "weights=[1.0, 2.0]"),
    "segments": (
        lambda: softclip_loss(X, Y, SCALE, Blocks(Hard(), torch.arange(5), torch.arange(6))),
        ValueError,
        "segments of the rows has shape (5,)",
    ),
    "segment dtype": (
        lambda: softclip_loss(X, Y, SCALE, Blocks(Hard(), torch.zeros(6), torch.zeros(6))),
        TypeError,
        "segments of the rows has dtype torch.float32",
    ),
    "segment of the positive": (
        lambda: softclip_loss(X, Y, SCALE, Blocks(Hard(), torch.arange(6), torch.arange(6) // 3)),
        ValueError,
        "row 1 is of segment 1 but its positive of 0",
    ),
    "blocks in blocks": (
        lambda: softclip_loss(X, Y, SCALE, Blocks(Blocks(Hard(), *SEGMENTS), *SEGMENTS)),
        ValueError,
        "Blocks inside Blocks",
    ),
    "loss weights": (
        lambda: softclip_loss(X, Y, SCALE, Weighted(Hard(), torch.ones(7))),
        ValueError,
        "weights of the rows has shape (7,)",
    ),
    "negative weights": (lambda: Weighted(Hard(), -1.0), ValueError, "weights=-1.0"),
    "nan weights": (lambda: Weighted(Hard(), X[:, 0] * torch.nan), ValueError, "weights must be finite"),
    "nan average": (lambda: Average([Hard()], [float("nan")]), ValueError, "weights=[nan]"),
    "psd swap": (lambda: psd(swap="both"), ValueError, "swap='both'"),
    "psd scope": (lambda: psd(scope="rows"), ValueError, "scope='rows'"),
    "psd hard": (lambda: psd(hard="diagonal"), TypeError, "hard"),
    "psd scale": (lambda: psd(teacher_scale="free"), ValueError, "teacher_scale='free'"),
    "psd negative scale": (lambda: psd(teacher_scale=-1.0), ValueError, "teacher_scale=-1.0"),
    "psd step": (lambda: psd_of(torch.tensor(3), 6), TypeError, "step must be an integer, not Tensor; pass int(step)"),
    "psd fraction": (lambda: psd_of(0.5, 6), TypeError, "step must be an integer, not float"),
    "psd pairs": (lambda: psd_of(3, torch.tensor(6)), TypeError, "n must be an integer, not Tensor; pass int(n)"),
    "psd size": (
        lambda: softclip_loss(X, Y, SCALE, ProgressiveSelfDistillation(schedules.Constant(0.5)).at(0, 7)),
        ValueError,
        "made for n=7 pairs, but the batch has 6 rows",
    ),
    "schedule value": (lambda: schedules.Linear(0.0, 1.1, 5), ValueError, "end=1.1"),
    "schedule steps": (lambda: schedules.Cosine(0.0, 1.0, 0), ValueError, "steps=0"),
    "milestones": (lambda: schedules.Step((5, 5), (0.0, 0.1, 0.2)), ValueError, "milestones=(5, 5)"),
    "warm-up": (lambda: schedules.WarmUp(-1, schedules.Constant(0.0)), ValueError, "steps=-1"),
    "partition": (lambda: partition(4, 5, 0, 0), ValueError, "soft=5"),
    "partition step": (lambda: partition(4, 2, 0, -1), ValueError, "step=-1"),
    "custom schedule": (
        lambda: ProgressiveSelfDistillation(lambda step: 2.0).at(0, 6),
        ValueError,
        "schedule's alpha=2.0",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(case, monkeypatch):
    call, error, words = BAD_CALLS[case]
    monkeypatch.setattr(backends, "select", lambda *_: pytest.fail("compute began before the error"))
    with pytest.raises(error, match=re.escape(words)):
        call()


def test_what_must_not_be_refused():
    """Rectangles with labels, a scale of shape (1,), a CPU float64 scale, numbers, int32 labels; numpy's integers."""
    for scale in (SCALE, SCALE.reshape(1), SCALE.double(), 10, 10.0, np.float32(10)):
        assert softclip_loss(X, Y[:4], scale, Hard(torch.zeros(6, dtype=torch.int32))).isfinite()
    assert psd_of(np.int64(3), np.int32(6)) is not None
