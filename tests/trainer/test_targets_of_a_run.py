"""The targets of a configuration as a run takes them: over two ranks, under ZeRO, with every kind of teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import engines
from helpers.engines import KINDS, PAIRS, take_step, teachers_of, weights
from helpers.ranks import Pool
from helpers.taught import DECAY, END, HARD, RANKS, RISE, config, write_run
from torch import Tensor

from softclip_kernels import (
    Average,
    Blocks,
    Hard,
    Mix,
    Ratio,
    SelfTeacher,
    Target,
    Teacher,
    partition,
    softclip_loss,
)
from train import checkpoint
from train.config import Config

STEPS = 20
FEW, SPOILT = 6, 3  # steps, and the one that is skipped
FOLDER = "FOLDER"  # in a case, that of a checkpoint
COSINE = [0.0] * HARD + [END * (1 - math.cos(math.pi * k / RISE)) / 2 for k in range(RISE)] + [END] * 8
LINEAR = [0.0] * HARD + [END * k / RISE for k in range(RISE)] + [END] * 8
AT_ONCE, STAIRS = [0.0] * HARD + [END] * 16, [0.0] * 3 + [0.25] * 9 + [1.0] * 8


# --- Every target equals the library's


@dataclass(frozen=True)
class Given:
    """Of a step, in one process: α, the labels, and what the teachers make of the batch."""

    step: int
    alpha: float
    labels: Tensor
    ema: Teacher
    frozen: Teacher

    def psd(self, soft: Target, hard: Target | None = None, blocks: bool = False) -> Target:
        mask = partition(PAIRS, round(self.alpha * PAIRS), 0, self.step)
        mixed = Mix(hard or Hard(), soft, mask.float())
        return Blocks(mixed, mask.long(), mask.long()) if blocks else mixed

    def groups(self, smoothing: float = 0.0) -> Hard:
        return Hard(smoothing=smoothing, groups=(self.labels, self.labels))


@dataclass(frozen=True)
class Case:
    """Options of section `loss`, and what they mean: the target where soft ones have a part, that where they have none,
    and α at each step."""

    options: dict[str, Any]
    soft: Callable[[Given], Target]
    hard: Callable[[Given], Target]
    alphas: list[float]


def case(soft: Callable[[Given], Target], alphas: list[float] = COSINE, /, **options: Any) -> Case:
    return Case(options, soft, lambda given: Hard(), alphas)


def hard(target: Callable[[Given], Target], **options: Any) -> Case:
    return Case({"target": "hard", **options}, target, target, [0.0] * STEPS)


PAIRED, OWN = SelfTeacher("tied", "paired"), SelfTeacher("tied", "none")
CASES = {
    "hard": hard(lambda given: Hard()),
    "smoothing": hard(lambda given: Hard(smoothing=0.1), smoothing=0.1),
    "groups": hard(lambda given: given.groups(), positives="label"),
    "psd": case(lambda given: given.psd(PAIRED)),
    "psd of smoothed groups": Case(
        {"positives": "label", "smoothing": 0.1},
        lambda given: given.psd(PAIRED, given.groups(0.1)),
        lambda given: given.groups(0.1),
        COSINE,
    ),
    "a ratio": case(lambda given: given.psd(SelfTeacher(Ratio(2.0))), swap="none", teacher_scale_ratio=2.0),
    "a scale, a linear rise": case(
        lambda given: given.psd(SelfTeacher(7.0, "paired")), LINEAR, schedule="linear", teacher_scale=7.0
    ),
    "block, at once": case(lambda given: given.psd(PAIRED, blocks=True), AT_ONCE, scope="block", schedule="constant"),
    "sinkhorn": case(lambda given: given.psd(SelfTeacher(normalise="sinkhorn")), swap="none", normalise="sinkhorn"),
    "blend, in steps": case(
        lambda given: Mix(Hard(), PAIRED, given.alpha),
        STAIRS,
        **{"target": "blend", "schedule": "step", "alpha_milestones": [3, 12], "alpha_values": [0.0, 0.25, 1.0]},
    ),
    "ema": case(lambda given: given.psd(given.ema), teachers=["ema"], swap="none"),
    "ema, paired": case(lambda given: given.psd(given.ema.transposed()), teachers=["ema"]),
    "ema, a blend of sinkhorn": case(
        lambda given: Mix(Hard(), replace(given.ema, normalise="sinkhorn"), given.alpha),
        **{"target": "blend", "teachers": ["ema"], "swap": "none", "normalise": "sinkhorn"},
    ),
    "frozen": case(lambda given: given.psd(given.frozen.transposed()), teachers=[FOLDER]),
    "frozen, a ratio": case(
        lambda given: given.psd(replace(given.frozen, scale=Ratio(0.5))),
        **{"teachers": [FOLDER], "swap": "none", "teacher_scale_ratio": 0.5},
    ),
    "two with weights": case(
        lambda given: given.psd(Average([OWN, given.frozen], [1.0, 3.0])),
        **{"teachers": ["self", FOLDER], "teacher_weights": [1.0, 3.0], "swap": "none"},
    ),
    "three in a blend": case(
        lambda given: Mix(Hard(), Average([given.frozen.transposed(), PAIRED, given.ema.transposed()]), given.alpha),
        **{"target": "blend", "teachers": [FOLDER, "self", "ema"]},
    ),
}


Seen = tuple[dict[str, Tensor], float]  # of a step: the weights that it began with, and its loss


def _train(group: Any, options: Config) -> list[Seen]:
    made = engines.bundle()
    teachers = teachers_of(group, options, made)
    engine = engines.start(group, options, made)
    seen = [(weights(engine), take_step(engine, step, options, group, teachers).loss) for step in range(STEPS)]
    engine.destroy()
    return seen


def averages(states: list[dict[str, Tensor]], skipped: tuple[int, ...] = ()) -> list[dict[str, Tensor]]:
    """What the moving average is before each step and after the last, in float64, by the states of the student then."""
    found = [{name: one.double() for name, one in states[0].items()}]
    for step, state in enumerate(states[1:]):
        d = min(DECAY, (1 + step) / (10 + step))
        moved = {name: d * mean + (1 - d) * state[name].double() for name, mean in found[-1].items()}
        moved["mean"] = state["mean"].double()  # a buffer
        found.append(found[-1] if step in skipped else moved)
    return found


def rows(module: Any, state: dict[str, Tensor], seen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    module.load_state_dict(state)
    with torch.no_grad():
        x, y, scale = module(*seen)
    return x.double(), y.double(), scale.double()


def losses_of(one: Case, states: list[dict[str, Tensor]], teacher: Path) -> list[float]:
    """Of every step, by the weights that it began with: the whole batch in this process, with the library's loss in
    float64."""
    towers, means, found = engines.bundle().module, averages(states), []
    other = checkpoint.read_bundle(teacher).module
    for step, state in enumerate(states):
        ema, frozen = (
            Teacher(*rows(module, weights, seen))
            for module, weights, seen in (
                (towers, means[step], engines.batch(step)),
                (other, other.state_dict(), engines.view(step)),
            )
        )
        given = Given(step, one.alphas[step], engines.labels(step), ema, frozen)
        x, y, scale = rows(towers, state, engines.batch(step))
        target = one.soft(given) if given.alpha > 0.0 else one.hard(given)
        found.append(float(softclip_loss(x, y, scale, target, backend="chunked")))
    return found


TOLERANCE = 1e-6  # of embeddings in float32, cut into other parts; seen: 1.3e-7


@pytest.mark.parametrize(("kind", "micro_batches"), (("1", 3), ("3", 1)))
def test_every_target_of_the_configuration_equals_the_librarys_in_one_process(
    pool: Pool, tmp_path: Path, kind: str, micro_batches: int
) -> None:
    """20 steps over two ranks. The reference is given nothing of the trainer's but the weights of each step."""
    folder = write_run(tmp_path / "run")
    for name, one in CASES.items():
        named = [str(folder) if teacher == FOLDER else teacher for teacher in one.options.get("teachers", ["self"])]
        options = config(kind, micro_batches, **{**one.options, "teachers": named})
        assert [options.loss.alpha()(step) for step in range(STEPS)] == pytest.approx(one.alphas), name
        trained, _ = pool.run(_train, options)
        expected = losses_of(one, [state for state, _ in trained], folder)
        assert [loss for _, loss in trained] == pytest.approx(expected, rel=TOLERANCE), name


# --- The moving average


def _averaged(group: Any, options: Config) -> tuple[list[dict[str, Tensor]], list[bool], dict[str, Tensor]]:
    """The student before each step and after the last; which steps were applied; the average after the last."""
    from train.step import train_step

    made = engines.bundle()
    teachers = teachers_of(group, options, made)
    engine = engines.start(group, options, made)
    states, applied = [weights(engine)], []
    for step in range(FEW):
        share = engines.share(step, dist.get_rank(), RANKS)
        if step == SPOILT and dist.get_rank() == 1:
            share.images[0, 0, 0, 0] = torch.nan
        with torch.no_grad():
            engine.module.mean.fill_(0.1 * step)
        applied.append(train_step(engine, share, step, options, group, teachers).applied)
        states.append(weights(engine))
    engine.destroy()
    assert teachers.ema is not None and not teachers.ema.training
    return states, applied, teachers.ema.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_the_moving_average_is_exact_however_the_parameters_are_held(pool: Pool, kind: str) -> None:
    (states, applied, ema), (_, _, other) = pool.run(_averaged, config(kind, teachers=["ema"], hard_steps=0))
    assert applied == [step != SPOILT for step in range(FEW)]
    expected = averages(states, skipped=(SPOILT,))[-1]
    assert ema.keys() == other.keys() == expected.keys()
    for name, mean in expected.items():
        assert torch.equal(ema[name], other[name]), name
        assert (ema[name].double() - mean).norm() <= 1e-7 * mean.norm(), name
        assert name == "mean" or not torch.equal(ema[name], states[-1][name]), name
