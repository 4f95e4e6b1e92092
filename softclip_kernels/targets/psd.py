"""Progressive self-distillation, after Andonian, Chen and Hamid, "Robust Cross-Modal Representation Learning with
Progressive Self-Distillation", CVPR 2022. What the paper's abstract says: in every minibatch a subset of the pairs gets
soft targets made by the model itself, and the subset grows during training. What it leaves open is an option here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .. import checks
from .base import Target, check_target
from .combine import Average, Blocks, ForBatch, Mix
from .hard import Hard
from .schedules import Schedule
from .soft import Normalise, Scale, SelfTeacher, Teacher, check_scale


def partition(n: int, soft: int, seed: int, step: int) -> Tensor:
    """Which `soft` of `n` pairs are soft: a (n,) bool CPU tensor, drawn without replacement. A function of its
    arguments only, the same on every rank, machine and resume (numpy's Philox counter, keyed by seed and step)."""
    if not 0 <= soft <= n:
        raise ValueError(f"soft={soft} must lie in [0, {n}]")
    if seed < 0 or step < 0:
        raise ValueError(f"seed={seed} and step={step} must not be negative")
    draws = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64))).random(n)
    mask = np.zeros(n, dtype=bool)
    mask[np.argsort(draws, kind="stable")[:soft]] = True
    return torch.from_numpy(mask)


@dataclass(frozen=True)
class ProgressiveSelfDistillation:
    """Which pairs are soft at a step, and what teaches them.

        target = psd.at(step, n);  loss = softclip_loss(x, y, logit_scale, target)

    schedule       alpha(step) in [0, 1], the soft share; see schedules
    seed           of the draw of round(alpha * n) pairs, a function of (seed, step) only
    swap           "paired": pair i's text→image distribution teaches its image→text row, and the other way round;
                   "none": each direction teaches itself
    scope          "full": soft rows range over all columns; "block": soft pairs see soft pairs, hard pairs hard ones
    teacher_scale  "tied" to the student's logit scale, a Ratio to it, or the self teacher's own, already exponentiated
    teacher        None: the model itself. Otherwise a Teacher, or several (averaged), of the whole batch; or any other
                   target, which is taken as it is (swap and normalise play no part)
    hard           what the other pairs match
    normalise      of the self teacher; see SoftTarget
    """

    schedule: Schedule
    seed: int = 0
    swap: str = "paired"
    scope: str = "full"
    teacher_scale: Scale = "tied"
    teacher: Target | Sequence[Teacher] | None = None
    hard: Target = field(default_factory=Hard)
    normalise: Normalise = "row"

    def __post_init__(self) -> None:
        checks.one_of("swap", self.swap, ("none", "paired"))
        checks.one_of("scope", self.scope, ("full", "block"))
        check_scale("teacher_scale", self.teacher_scale, ("tied",))
        check_target("hard", self.hard)

    def at(self, step: int, n: int, teacher: Target | Sequence[Teacher] | None = None) -> Target:
        """The target of optimizer step `step` for a global batch of n pairs. `teacher` (external embeddings of this
        batch) takes the place of the constructor's. Both numbers are integers; with gradient accumulation, `step` must
        stay the same until the optimizer's."""
        step, n = checks.whole_number("step", step), checks.whole_number("n", n)
        alpha = self.schedule(step)
        checks.number_in("the schedule's alpha", alpha, 0.0, 1.0)
        count = round(alpha * n)
        if count == 0:  # CLIP, at CLIP's cost
            return ForBatch(self.hard, n)
        soft = partition(n, count, self.seed, step)
        target: Target = Mix(self.hard, self._soft_target(self.teacher if teacher is None else teacher), soft.float())
        return ForBatch(Blocks(target, soft.long(), soft.long()) if self.scope == "block" else target, n)

    def _soft_target(self, teacher: Target | Sequence[Teacher] | None) -> Target:
        if teacher is None:
            return SelfTeacher(self.teacher_scale, self.swap, normalise=self.normalise)
        if isinstance(teacher, Target) and not isinstance(teacher, Teacher):
            return teacher
        teachers = [teacher] if isinstance(teacher, Teacher) else list(teacher)
        if self.swap == "paired":
            teachers = [given.transposed() for given in teachers]
        return teachers[0] if len(teachers) == 1 else Average(teachers)
