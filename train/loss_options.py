"""The section `loss` of the options: which target the loss has, who teaches it, and how far."""

from __future__ import annotations

from dataclasses import dataclass

from softclip_kernels import backends, schedules

from .option_checks import ConfigError, at_least, one_of, within


@dataclass(frozen=True)
class LossOptions:
    """What the pairs of a batch should match; targets.target_at makes it.

    target               `hard` (CLIP); `psd`: a share α of the pairs, drawn anew at each step, has soft targets in
                         place of hard ones; `blend`: every pair has α of the soft target and 1 - α of the hard one
    positives            of the hard target: `pair`, the pair's own other half; `label`: every other half of its label
                         in the batch, equally
    smoothing            share of the hard target's mass that is spread evenly over the batch
    teachers             who makes the soft targets, in the mean where they are several: `self`; `ema`, an exponential
                         moving average of the towers; or other towers, which stay as they are: a run or a checkpoint of
                         one, or a form of model.towers with weights
    teacher_weights      of each teacher in that mean; empty: equal
    teacher_scale        the teachers' logit scale; None: each one's own
    teacher_scale_ratio  in its place, the multiple of the student's scale that it is
    swap                 `paired`: the text→image distribution of a pair teaches its image→text row, and the other way
                         round; `none`: each direction teaches itself
    scope                `full`: soft pairs see all; `block`: soft pairs see soft ones and hard pairs hard ones
    normalise            of a teacher's logits: `row`, the softmax of each direction; `sinkhorn`, both in turn
    ema_decay            d of `ema`, whose weights become d * weights + (1 - d) * the student's after each step; at step
                         t it is at most (1 + t) / (10 + t)
    schedule             of α: 0 for `hard_steps` steps, then from `alpha_start` to `alpha_end` over `rise_steps`, by
                         `linear` or `cosine`, or at once by `constant`; or `step`: alpha_values[k] from step
                         alpha_milestones[k - 1] on, alpha_values[0] before the first
    """

    target: str = "psd"
    positives: str = "pair"
    smoothing: float = 0.0
    teachers: tuple[str, ...] = ("self",)
    teacher_weights: tuple[float, ...] = ()
    teacher_scale: float | None = None
    teacher_scale_ratio: float | None = None
    swap: str = "paired"
    scope: str = "full"
    normalise: str = "row"
    ema_decay: float = 0.99
    schedule: str = "cosine"
    hard_steps: int = 120
    rise_steps: int = 240
    alpha_start: float = 0.0
    alpha_end: float = 0.3
    alpha_milestones: tuple[int, ...] = ()
    alpha_values: tuple[float, ...] = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        one_of("loss.target", self.target, ("hard", "psd", "blend"))
        one_of("loss.positives", self.positives, ("pair", "label"))
        within("loss.smoothing", self.smoothing, 0.0, 1.0)
        self._check_teachers()
        one_of("loss.schedule", self.schedule, ("constant", "linear", "cosine", "step"))
        # A run that was started under a former name of its backend goes on, and says the name it has now.
        object.__setattr__(self, "backend", backends.current_name(self.backend))
        one_of("loss.backend", self.backend, ("auto", *backends.registered()))
        at_least("loss.hard_steps", self.hard_steps, 0)
        at_least("loss.rise_steps", self.rise_steps, 1)
        for name, alphas in (("start", [self.alpha_start]), ("end", [self.alpha_end]), ("values", self.alpha_values)):
            for alpha in alphas:
                within(f"loss.alpha_{name}", alpha, 0.0, 1.0)
        rising = list(self.alpha_milestones) == sorted(set(self.alpha_milestones))
        values = len(self.alpha_milestones) + 1 if self.schedule == "step" else 0
        if not rising or len(self.alpha_values) != values or (not values and self.alpha_milestones):
            raise ConfigError(
                f"loss.alpha_milestones={list(self.alpha_milestones)} and loss.alpha_values={list(self.alpha_values)} "
                f"with loss.schedule={self.schedule!r}; allowed: with 'step' rising steps and one value more than they "
                "are, else none"
            )

    def _check_teachers(self) -> None:
        if not self.teachers or len(set(self.teachers)) != len(self.teachers) or not all(map(str.strip, self.teachers)):
            raise ConfigError(f"loss.teachers={list(self.teachers)}; allowed: one or more, each once")
        if self.teacher_weights and len(self.teacher_weights) != len(self.teachers):
            raise ConfigError(
                f"loss.teacher_weights={list(self.teacher_weights)} for {len(self.teachers)} teachers; allowed: one "
                "for each"
            )
        for weight in self.teacher_weights:
            within("loss.teacher_weights", weight, 1e-6, 1e6)
        for name in ("teacher_scale", "teacher_scale_ratio"):
            if getattr(self, name) is not None:
                within(f"loss.{name}", getattr(self, name), 1e-3, 1e3)
        if None not in (self.teacher_scale, self.teacher_scale_ratio):
            raise ConfigError(
                f"loss.teacher_scale={self.teacher_scale} and loss.teacher_scale_ratio={self.teacher_scale_ratio}; "
                "allowed: one of them"
            )
        one_of("loss.swap", self.swap, ("none", "paired"))
        one_of("loss.scope", self.scope, ("full", "block"))
        if self.scope == "block" and (self.target != "psd" or self.positives != "pair"):
            raise ConfigError(
                f"loss.scope='block' with loss.target={self.target!r} and loss.positives={self.positives!r}; allowed: "
                "with 'psd' and 'pair'"
            )
        one_of("loss.normalise", self.normalise, ("row", "sinkhorn"))
        within("loss.ema_decay", self.ema_decay, 0.0, 1.0)

    def alpha(self) -> schedules.Schedule:
        """What the soft targets have a part in at a step, counted from 0: a pure function of it."""
        if self.target == "hard":
            return schedules.Constant(0.0)
        if self.schedule == "step":
            return schedules.Step(self.alpha_milestones, self.alpha_values)
        if self.schedule == "constant":
            after: schedules.Schedule = schedules.Constant(self.alpha_end)
        else:
            ramp = {"linear": schedules.Linear, "cosine": schedules.Cosine}[self.schedule]
            after = ramp(self.alpha_start, self.alpha_end, self.rise_steps)
        return schedules.WarmUp(self.hard_steps, after)
