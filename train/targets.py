"""What a batch should match at a step: the options of section `loss` as a target of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from softclip_kernels import (
    Average,
    Hard,
    Mix,
    ProgressiveSelfDistillation,
    Ratio,
    SelfTeacher,
    Target,
    Teacher,
)
from softclip_kernels.targets import ForBatch

from .loss_options import LossOptions

SELF, EMA = "self", "ema"  # of loss.teachers; any other is a place of towers


def teachers_of(loss: LossOptions) -> tuple[str, ...]:
    """Those of loss.teachers that have a part in a run: hard targets have none."""
    return () if loss.target == "hard" else loss.teachers


@dataclass(frozen=True)
class Taught:
    """What a teacher made of this rank's share of a batch: rows of the images (b, E) and of the texts (b, E), and its
    own logit scale."""

    images: Tensor
    texts: Tensor
    scale: float


def target_at(
    step: int,
    pairs: int,
    loss: LossOptions,
    seed: int,
    labels: Tensor | None = None,
    taught: Mapping[str, Taught] | None = None,
) -> Target:
    """What the global batch of `pairs` pairs should match; what is drawn is a function of (seed, step), alike on all
    ranks.

    labels  (b,) int64 of this rank's share, which loss.positives=label needs
    taught  by each of loss.teachers but SELF, wherever soft targets have a part in the step
    """
    hard = _hard(loss, labels)
    alpha = loss.alpha()
    if alpha(step) == 0.0:
        return ForBatch(hard, pairs)
    teachers = [_teacher(name, loss, taught or {}) for name in loss.teachers]
    soft = teachers[0] if len(teachers) == 1 else Average(teachers, loss.teacher_weights or None)
    if loss.target == "blend":
        return ForBatch(Mix(hard, soft, alpha(step)), pairs)
    # "none": where they are to be swapped, the teachers are so already.
    return ProgressiveSelfDistillation(alpha, seed, "none", loss.scope, teacher=soft, hard=hard).at(step, pairs)


def _hard(loss: LossOptions, labels: Tensor | None) -> Target:
    if loss.positives == "pair":
        return Hard(smoothing=loss.smoothing)
    assert labels is not None  # training data without are refused at the start
    # The pair itself stands beside its label without weight: it is the one positive whose rank is logged.
    return Mix(Hard(smoothing=loss.smoothing, groups=(labels, labels)), Hard(), 0.0)


def _teacher(name: str, loss: LossOptions, taught: Mapping[str, Taught]) -> Target:
    given = loss.teacher_scale if loss.teacher_scale_ratio is None else Ratio(loss.teacher_scale_ratio)
    if name == SELF:
        return SelfTeacher("tied" if given is None else given, loss.swap, normalise=loss.normalise)
    of = taught[name]
    teacher = Teacher(of.images, of.texts, of.scale if given is None else given, normalise=loss.normalise)
    return teacher.transposed() if loss.swap == "paired" else teacher
