"""One process of a training run: its set-up, the loop over steps with checkpoints, and the evaluation at the end."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint, evaluate, fingerprint, metrics, plot, resume, towers
from .auto import settle
from .config import Config
from .data import Batch, TrainingData, count_bad, open_training_data
from .engine import make_engine
from .engine_state import copy_weights, gather_weights, load_engine, nonfinite, save_engine
from .evaluate import report
from .evaluate.sets import Evaluation, read_evaluation
from .files import explain
from .heartbeat import Heartbeat
from .options import SKIP_WINDOW
from .set_up import build_towers, check_labels, check_optimizer, check_options
from .signals import StoppedError, name_of, stop
from .step import StepResult, train_step
from .targets import EMA
from .teachers import Teachers, find_teachers, read_teachers
from .towers import Bundle
from .world import ElsewhereError, World, asked_to_stop, on_each, on_first


class NonFiniteError(checkpoint.RunError):
    """More batches had a non-finite loss or gradient than the configuration allows, or the model itself is not."""


@dataclass(frozen=True)
class Task:
    """What a process is asked to do: train as `config` says, to the last step or to step `stop_after`, in folder
    `run`."""

    config: Config
    run: Path
    stop_after: int | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of a step: what its batch was waited for, and all of it."""

    data: float
    step: float


@dataclass
class Trainer:
    """Everything a process holds while it trains.

    config      with every `auto` of the training step settled
    choices     how, in words
    evaluation  what it is evaluated on
    log         rank 0's alone, None elsewhere
    state       the steps that are done and skipped
    evaluated   towers for evaluations on the way, as soon as there was one
    """

    config: Config
    choices: str
    run: Path
    world: World
    heartbeat: Heartbeat
    bundle: Bundle
    engine: Any
    teachers: Teachers
    data: TrainingData
    evaluation: Evaluation
    log: metrics.Log | None
    state: checkpoint.State
    fingerprint: fingerprint.Fingerprint
    evaluated: Bundle | None = None


def train(task: Task, world: World, heartbeat: Heartbeat) -> str | None:
    """Train to the last step, then evaluate; or train to step `stop_after`. Returns None, or, where a rank was asked to
    stop, what is left and how to go on; where that is in the evaluation at the end, rank 0 raises StoppedError."""
    began = time.perf_counter()
    trainer = _set_up(task, world, heartbeat)
    steps = task.config.optimizer.steps
    last = min(steps, task.stop_after or steps)
    # From here on a request waits for the end of a step. One that ended a rank before this line shows in this exchange.
    stop.act_at_once(None)
    asked_to_stop(trainer.world)
    if trainer.log is not None:
        for note in trainer.bundle.notes:
            trainer.log.say(f"{task.config.model.towers}: {note}")
        for name, found in trainer.teachers.found.items():
            trainer.log.say(f"teacher {name}: the weights of {found.place}, SHA-256 {found.sha256}")
        seconds = f"{time.perf_counter() - began:.1f} s"
        trainer.log.say(
            f"run {task.run}: {_describe(trainer)}, steps {trainer.state.step} to {last}; ready in {seconds}"
        )
    try:
        readers = list(trainer.teachers.frozen.values())
        batches = trainer.data.batches(trainer.bundle, world, trainer.state.step, last, readers)
        with closing(batches):  # its worker processes
            stopped = _loop(trainer, last, batches)
        if last == steps and stopped is None:
            _finish(trainer)
        heartbeat.enter(trainer.state.step, "done")
    finally:
        if trainer.log is not None:
            trainer.log.close()
    # The engine before the groups that it uses: the other way round a process may abort at exit.
    trainer.engine.destroy()
    del trainer
    gc.collect()
    return stopped


def _set_up(task: Task, world: World, heartbeat: Heartbeat) -> Trainer:
    config, run, first = task.config, task.run, world.rank == 0
    _quiet()
    on_each(world, lambda: check_options(config, world.size))
    found = find_teachers(config.loss, world)
    data = on_each(world, lambda: open_training_data(config))
    on_each(world, lambda: check_labels(config, data))
    evaluation = read_evaluation(config.data, world)  # what is wrong with it is said before the first step
    heartbeat.tick()
    resumed = on_first(world, lambda: checkpoint.find(run, engine=True) if checkpoint.has_any(run) else None)
    bundle = build_towers(config, data, resumed, world)
    config, choices = on_first(world, lambda: settle(config, bundle, world.size, world.device))
    bundle.module.precision = config.job.precision
    teachers = read_teachers(config, found, bundle, world)
    heartbeat.tick()
    taught, evaluated = teachers.fingerprint(config.loss), evaluation.fingerprints()
    now = on_first(world, lambda: fingerprint.take(data.fingerprint, evaluated, world.device, taught))
    state = checkpoint.State(0, 0, world.size, config.job.zero_stage)
    if resumed is not None:
        state = on_first(world, lambda: resume.check(config, task.stop_after, resumed, world, now))
    on_each(world, lambda: check_optimizer(bundle, config))
    engine = make_engine(bundle, config, world)
    if resumed is not None:
        load_engine(engine, resumed)
        on_each(world, partial(teachers.resume, resumed))
    if data.noisy is not None and resumed is None:
        on_first(world, partial(data.noisy.write_account, run))
    log = on_each(world, lambda: metrics.Log(run, state.step, config.optimizer.steps, config) if first else None)
    return Trainer(config, choices, run, world, heartbeat, bundle, engine, teachers, data, evaluation, log, state, now)


def _loop(trainer: Trainer, last: int, batches: Iterator[Batch]) -> str | None:
    """Train up to step `last`, or to the end of the step in which a rank is asked to stop: then returns the words for
    it."""
    options, world = trainer.config.job, trainer.world
    while trainer.state.step < last:
        began, step = time.perf_counter(), trainer.state.step
        trainer.heartbeat.enter(step, "training")
        batch = next(batches)
        ready = time.perf_counter()
        # Of dropout and the like: a function of (seed, step), too.
        torch.manual_seed(_step_seed(options.seed, step, world.rank))
        trainer.engine.train()
        result = train_step(trainer.engine, batch, step, trainer.config, world.group, trainer.teachers)
        trainer.state = trainer.state.after(result.applied, result.bad)
        _record(trainer, step, result, Times(ready - began, time.perf_counter() - began))
        if result.bad:
            _check_bad(trainer, batch)
        if not result.applied:
            _name_samples(trainer, step, batch)
            on_each(world, partial(_check_skipped, trainer, step))
        if options.evaluate_every and (step + 1) % options.evaluate_every == 0 and trainer.config.data.evaluate:
            trainer.heartbeat.enter(step, "evaluation")
            _evaluate_on_the_way(trainer, step)
        due = (step + 1) % options.checkpoint_every == 0 or step + 1 == last
        request = asked_to_stop(world)
        if due or request:
            trainer.heartbeat.enter(step, "saving")
            save(trainer)
        if request or (due and (request := asked_to_stop(world))):  # it takes a while to save
            folder = trainer.run / checkpoint.FOLDER / checkpoint.name_of(step + 1)
            return f"stopped by {name_of(request)} after step {step}: {folder}; go on with --resume {trainer.run}"
    return None


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_bad(trainer: Trainer, batch: Batch) -> None:
    """Count the bad records of a batch by reason, and raise DataError where there are too many in all. All ranks come
    here together."""
    counts: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(counts, batch.bad, group=trainer.world.group)
    total = sum(map(Counter, counts), Counter[str]())
    if trainer.log is not None:
        trainer.log.say(f"step {trainer.state.step - 1}: bad samples replaced: {count_bad(total)}")
    on_each(trainer.world, lambda: trainer.data.check_bad(trainer.state.bad, trainer.state.step, total))


def _name_samples(trainer: Trainer, step: int, batch: Batch) -> None:
    """The samples of a skipped batch, of all ranks, into the log of the first."""
    keys: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(keys, batch.keys, group=trainer.world.group)
    if trainer.log is not None:
        trainer.log.nonfinite(step, tuple(key for share in keys for key in share))


def _check_skipped(trainer: Trainer, step: int) -> None:
    """Raise NonFiniteError where too many steps were skipped. Every rank counts the same, so all of them stop together,
    and the first says why."""
    options, state = trainer.config.job, trainer.state
    recent = len(state.recent_skips)
    if options.on_nonfinite == "stop":
        why = "job.on_nonfinite=stop"
    elif state.skipped_in_a_row > options.max_skipped_in_a_row:
        why = (
            f"it is number {state.skipped_in_a_row} in a row (job.max_skipped_in_a_row={options.max_skipped_in_a_row})"
        )
    elif recent / SKIP_WINDOW > options.max_skipped_share:
        why = (
            f"of the last {SKIP_WINDOW} steps {recent} were skipped (job.max_skipped_share={options.max_skipped_share})"
        )
    else:
        return
    raise NonFiniteError(
        f"the loss or gradient of step {step} is not finite, and the job ends: {why}. The samples of each skipped "
        f"batch are named in {trainer.run / metrics.NONFINITE}. Go on with --resume {trainer.run} and that option "
        "changed, or start a new run with a lower optimizer.lr"
    )


def _record(trainer: Trainer, step: int, result: StepResult, times: Times) -> None:
    """The step's row in the log, on the rank that has one."""
    log, config, state = trainer.log, trainer.config, trainer.state
    if log is None:
        return
    samples = config.optimizer.batch_size
    apart = {name: value for name in ("r1_clean", "r1_noisy") if (value := getattr(result, name)) is not None}
    log.step(
        step,
        {
            "loss": result.loss,
            "alpha": config.loss.alpha()(step),
            "scale": result.scale,
            "r1_image_to_text": result.r1_image_to_text,
            "r1_text_to_image": result.r1_text_to_image,
            **apart,
            "lr": config.optimizer.lr_at(step),
            "grad_norm": result.grad_norm,
            "samples_per_second": samples / times.step,
            "data_seconds": times.data,
            "step_seconds": times.step,
            "memory_bytes": metrics.memory_in_use(trainer.world.device),
            "samples_seen": samples * state.step,
            "epoch": samples * state.step / trainer.data.epoch_length,
            "skipped": state.skipped,
            "bad": state.bad,
        },
    )
    if not result.applied:
        log.say(f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: skipped; see {metrics.NONFINITE}")


def save(trainer: Trainer) -> None:
    """A checkpoint of the present step; returns on all ranks once it is on disk. Where it cannot be, because the model
    is not finite or the disk is full, nothing of it stays, and all ranks raise together."""
    if trainer.log is not None:
        trainer.log.flush()  # no log may lack a step of a checkpoint
    step, weights = trainer.state.step, gather_weights(trainer.engine)
    ema = trainer.teachers.ema_weights() if trainer.world.rank == 0 else {}  # they are alike on all ranks
    named = {f"{name} ({EMA})": tensor for name, tensor in ema.items()}
    bad = nonfinite(trainer.engine, weights | named, trainer.world.group)
    on_each(trainer.world, partial(_check_finite, trainer, bad))
    try:
        scratch = on_first(trainer.world, lambda: checkpoint.begin(trainer.run, step))
        on_each(trainer.world, lambda: save_engine(trainer.engine, scratch / checkpoint.ENGINE))
        on_first(trainer.world, partial(_commit, trainer, scratch, weights, ema))
    except (OSError, ElsewhereError) as error:
        on_first(trainer.world, lambda: checkpoint.abandon(trainer.run, step))
        if not isinstance(error, OSError):
            raise
        raise checkpoint.RunError(
            f"the checkpoint of step {step} cannot be written ({explain(error)}); those before it are as they were. "
            f"Where the disk is full make room, and go on with --resume {trainer.run}"
        ) from error


def _commit(trainer: Trainer, scratch: Path, weights: dict[str, Tensor], ema: dict[str, Tensor]) -> None:
    files = trainer.bundle.files
    checkpoint.write_portable(scratch, weights, trainer.config, files, trainer.state, trainer.fingerprint, ema)
    options = trainer.config.job
    checkpoint.commit(trainer.run, scratch, trainer.state.step, options.keep_checkpoints, options.keep_every)


def _check_finite(trainer: Trainer, bad: list[str]) -> None:
    if bad:
        raise NonFiniteError(
            f"the checkpoint of step {trainer.state.step} is not written, for the model is not finite any more: NaN or "
            f"infinity in {checkpoint.name_some(bad)}. The checkpoints before it are as they were: go on with "
            f"--resume {trainer.run}, and if it comes again start a new run with a lower optimizer.lr or max_grad_norm"
        )


def _evaluate_on_the_way(trainer: Trainer, step: int) -> None:
    """R@1 on the first set, by all ranks in shares, in towers of their own: the engine's may be cut into parts."""
    config, world = trainer.config, trainer.world
    if trainer.evaluated is None:
        captions, files = trainer.data.captions, trainer.bundle.files
        trainer.evaluated = on_each(world, lambda: towers.build(config.model, captions, files=files))
    module = trainer.evaluated.module.to(world.device).eval()
    copy_weights(trainer.engine, module)
    name, pairs = next(iter(trainer.evaluation.sets.items()))
    result = evaluate.evaluate_set(trainer.evaluated, pairs, config.data, world)
    module.to("cpu")  # a GPU's memory is for training
    if trainer.log is not None:
        ways = {"image_to_text": result.image_to_text, "text_to_image": result.text_to_image}
        trainer.log.row(step, {f"{name}_r1_{way}": found.recall[1] for way, found in ways.items()})


def _finish(trainer: Trainer) -> None:
    """The table, from the checkpoint on disk: what `evaluate RUN` will read. Then the plot, by rank 0."""
    trainer.heartbeat.enter(trainer.state.step, "evaluation")
    config, run, world = trainer.config, trainer.run, trainer.world
    if trainer.evaluation.sets:
        folder = on_first(world, lambda: checkpoint.find(run))
        results = evaluate.evaluate_checkpoint(
            folder, trainer.evaluation, config.data, world, partial(_leave_if_asked, world)
        )

        def tell() -> None:
            assert trainer.log is not None
            trainer.log.say(f"\n{report.text(results, trainer.evaluation)}\n")  # first, for the disk may be full
            report.write(run, config.model.towers, folder.name, results, trainer.evaluation)
            trainer.log.say(str(run / report.TABLE))

        on_first(world, tell)
    curves = on_first(world, lambda: plot.plot([run]))
    if trainer.log is not None:
        trainer.log.say(str(curves))


def _leave_if_asked(world: World) -> None:
    """Raises StoppedError on rank 0 where any rank was asked to stop, and ElsewhereError on the others."""
    request = asked_to_stop(world)

    def leave() -> None:
        if request:
            raise StoppedError(name_of(request))

    on_first(world, leave)


def _describe(trainer: Trainer) -> str:
    config, world = trainer.config, trainer.world
    count = sum(getattr(one, "ds_numel", one.numel()) for one in trainer.bundle.module.parameters())  # whole, in ZeRO-3
    return (
        f"{config.model.towers}, {count / 1e6:.2f} M parameters, {trainer.data.describe()}, "
        f"{world.size} × {world.device.type}, {world.threads} CPU thread(s) each, ZeRO-{config.job.zero_stage}, "
        f"{trainer.choices}"
    )


def _quiet() -> None:
    """DeepSpeed reports every step of its set-up on every rank, and uses deprecated names of PyTorch's."""
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
