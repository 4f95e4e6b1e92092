"""The targets of a configuration as a run takes them: over two ranks, under ZeRO, with every kind of teacher."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import engines
from helpers.data import shard_of, tiny
from helpers.engines import KINDS, PAIRS, take_step, teachers_of, weights
from helpers.jobs import configuration, finish, start, training_rows
from helpers.ranks import Pool
from helpers.saved_runs import write_checkpoint
from helpers.sources import listed
from safetensors.torch import load_file
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
from train import checkpoint, engine_files
from train.config import Config
from train.data import open_training_data
from train.data.training import Indexed
from train.fingerprint import Fingerprint
from train.options import ConfigError, ModelOptions
from train.resume import compare
from train.set_up import check_labels
from train.teachers import ALONE
from train.towers import build

RANKS = 2
STEPS, HARD, RISE, END = 20, 4, 8, 0.5
FEW, SPOILT = 6, 3  # steps, and the one that is skipped
FOLDER = "FOLDER"  # in a case, that of a checkpoint
DECAY = 0.7
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


def config(kind: str, micro_batches: int = 1, **loss: Any) -> Config:
    options = {"hard_steps": HARD, "rise_steps": RISE, "alpha_end": END, "ema_decay": DECAY, **loss}
    sections = engines.config(kind, micro_batches=micro_batches).to_dict()
    return Config.from_dict({**sections, "loss": options})


def write_run(run: Path, towers: str = engines.NARROW_TOWERS, spoilt: str = "", **loss: Any) -> Path:
    """The checkpoint of a run of two ranks, with weights that no factory gives. `spoilt`: the file that has a NaN."""
    options = replace(config("1", **loss), model=ModelOptions(towers))
    with torch.random.fork_rng():
        torch.manual_seed(8)
        plain = build(options.model, tuple).module.state_dict()
        weights = {name: one + 0.1 * torch.randn_like(one) for name, one in plain.items()}
    ema = {name: one.clone() for name, one in weights.items()}
    for file, tensors in ((checkpoint.WEIGHTS, weights), (checkpoint.EMA_WEIGHTS, ema)):
        if file == spoilt:
            tensors["image.1.bias"][0] = torch.nan
    scratch, state = checkpoint.begin(run, 3), checkpoint.State(3, 0, RANKS, 1)
    (scratch / checkpoint.ENGINE).mkdir()
    for rank in range(RANKS):
        content = {"format": engine_files.FORMAT, "parts": [], "groups": [], "loss_scale": None}
        engine_files.write(scratch / checkpoint.ENGINE / engine_files.file_of(rank), content)
    with_ema = ema if "ema" in options.loss.teachers and spoilt != "none" else None
    checkpoint.write_portable(scratch, weights, options, {}, state, Fingerprint("data", "code"), with_ema)
    return checkpoint.commit(run, scratch, 3, keep=2, keep_every=0)


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


# --- Checkpoints and refusals


def found(run: Path, engine: bool) -> tuple[bool, str]:
    """Whether the run's one checkpoint can be used, and what is said about it."""
    said: list[str] = []
    try:
        checkpoint.find(run, said.append, engine)
    except checkpoint.CheckpointError:
        return False, said[0]
    return True, ""


@pytest.mark.parametrize(
    ("spoilt", "problem"),
    (
        ("none", "cannot be used (step-000003 lacks ema.safetensors, without which the teacher 'ema' cannot go on)"),
        (checkpoint.EMA_WEIGHTS, "is not finite (NaN or infinity in image.1.bias (ema))"),
    ),
)
def test_a_run_with_a_moving_average_goes_on_from_no_checkpoint_without_one(
    tmp_path: Path, spoilt: str, problem: str
) -> None:
    write_run(tmp_path, spoilt=spoilt, teachers=["ema"])
    assert found(tmp_path, engine=True) == (False, f"checkpoint step-000003 {problem}; trying an older one")
    assert found(tmp_path, engine=False) == (True, "")
    write_run(tmp_path / "whole", teachers=["ema"])
    assert found(tmp_path / "whole", engine=True) == (True, "")


@pytest.mark.parametrize(
    ("then", "now", "words"),
    (
        (("self", "a" * 64), ("self", "b" * 64), "self, aaaaaaaaaaaa then, self, bbbbbbbbbbbb now"),
        ((), ("ema",), "self then, ema now"),
        (("ema",), (), "ema then, self now"),
    ),
)
def test_a_run_does_not_go_on_with_another_teacher(
    tmp_path: Path, then: tuple[str, ...], now: tuple[str, ...], words: str
) -> None:
    folder = write_run(tmp_path, towers=engines.TOWERS)
    written = Fingerprint("data", "code", teachers=then)
    (folder / checkpoint.FINGERPRINT).write_text(written.to_json())
    options = config("1", teachers=["self", "moved/there"])  # where they lie is no matter
    assert ALONE.fingerprint(config("1").loss) == ALONE.fingerprint(config("1", target="hard").loss) == ()
    compare(options, folder, written)
    with pytest.raises(checkpoint.CheckpointError, match=r"loss.teachers=..self., .moved/there.. name") as caught:
        compare(options, folder, Fingerprint("data", "code", teachers=now))
    assert words in str(caught.value)


def _refused(group: Any, every: list[Config]) -> list[str]:
    words = []
    for options in every:
        try:
            teachers_of(group, options, engines.bundle())
        except Exception as error:
            words.append(f"{type(error).__name__}: {error}")
    return words


def test_a_teacher_that_cannot_be_had_is_refused_on_all_ranks_by_name(pool: Pool, tmp_path: Path) -> None:
    write_run(tmp_path / "spoilt", spoilt=checkpoint.WEIGHTS)
    (tmp_path / "empty").mkdir()
    problems = {
        "nowhere": "is no folder",
        "small": "is no folder",
        str(tmp_path / "empty"): "holds no checkpoints, and as one itself is not whole",
        str(tmp_path / "spoilt"): "holds no whole checkpoint",
        str(tmp_path / "spoilt" / "checkpoints" / "step-000003"): "is not finite (NaN or infinity in image.1.bias)",
        engines.RANDOM_TOWERS: "begins with random weights",
        "python:nowhere:towers": "cannot be made",
        "open_clip:": "cannot be made (model.towers='open_clip:'; allowed: ",
    }
    here, there = pool.run(_refused, [config("1", teachers=["self", name]) for name in problems])
    assert len(here) == len(problems)
    for said, other, (name, problem) in zip(here, there, problems.items(), strict=True):
        assert said.startswith(f"ConfigError: loss.teachers: {name!r} ") and problem in said, said
        assert other.startswith(f"ElsewhereError: rank 0: loss.teachers: {name!r}"), other


def test_labels_that_the_data_lack_are_asked_for_in_vain_before_the_first_step(data: Path, training: Indexed) -> None:
    by_label, without = config("1", positives="label"), copy(training)
    check_labels(by_label, training)
    without.source = listed(60)
    check_labels(config("1"), without)
    sections = tiny(data)["data"] | {"source": f"stream:{shard_of(data, 'train')}", "epoch_samples": 40}
    stream = open_training_data(Config.from_dict({"data": sections | {"distinct": "none"}}))
    for unlabelled in (without, stream):
        with pytest.raises(ConfigError, match=r"loss.positives='label', but not every record of data.source='emoji"):
            check_labels(by_label, unlabelled)


# --- A whole job


def test_a_job_with_teachers_goes_on_bitwise(data: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    """With all kinds of them at once, by a schedule of steps; the frozen one lies elsewhere when the run goes on."""
    write_checkpoint(tmp_path / "teacher", data, files, 5)
    shutil.copytree(tmp_path / "teacher", tmp_path / "moved")
    file = configuration(tmp_path, data, steps=12, keep_checkpoints=3, evaluate_every=0)
    schedule = ["loss.schedule=step", "loss.alpha_milestones=[2, 9]", "loss.alpha_values=[0.0, 0.5, 0.75]"]
    teachers = [f"loss.teachers=[{tmp_path / 'teacher'}, self, ema]", "loss.teacher_weights=[1, 1, 2]"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    status, said = finish(start("--config", str(file), "--folder", str(whole), *schedule, *teachers))
    assert status == 0, said
    assert f"teacher {tmp_path / 'teacher'}: the weights of {tmp_path / 'teacher'}/checkpoints/step-000005, SHA" in said

    shutil.copytree(whole, run)  # as it was after four steps
    for step in (8, 12):
        shutil.rmtree(run / checkpoint.FOLDER / checkpoint.name_of(step))
    status, said = finish(start("--resume", str(run), f"loss.teachers=[{tmp_path / 'moved'}, self, ema]"))
    assert status == 0, said
    assert "steps 4 to 12" in said
    assert training_rows(run) == training_rows(whole)
    assert [row["alpha"] for row in training_rows(run)] == [0.0] * 2 + [0.5] * 7 + [0.75] * 3
    weights, ema = (
        [load_file(checkpoint.find(one) / name) for one in (run, whole)]
        for name in (checkpoint.WEIGHTS, checkpoint.EMA_WEIGHTS)
    )
    for ours, theirs in (weights, ema):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(weights[0]["image.project.weight"], ema[0]["image.project.weight"])
