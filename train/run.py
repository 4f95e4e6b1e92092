"""One process of a training run: its set-up, the loop over steps with checkpoints, and the evaluation at the end."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import checkpoint, evaluate, fingerprint, metrics
from .auto import settle
from .config import SKIP_WINDOW, Config, ConfigError, OptimizerOptions
from .data import HeldOut, Pairs, Sampler, all_captions, data_folder, describe_bad, load_pairs, read_held_out
from .engine import gather_weights, load_engine, make_engine, nonfinite
from .evaluate import report
from .files import explain
from .heartbeat import Heartbeat
from .model import Clip
from .signals import name_of, stop
from .step import StepResult, train_step
from .tokenizer import train_tokenizer
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


@dataclass
class Trainer:
    """Everything a process holds while it trains.

    config    with every `auto` of the training step settled
    choices   how, in words
    held_out  what it is evaluated on: rank 0's alone, None elsewhere
    log       rank 0's alone, None elsewhere
    state     the steps that are done and skipped
    """

    config: Config
    choices: str
    run: Path
    world: World
    heartbeat: Heartbeat
    engine: Any
    sampler: Sampler
    tokenizer: Tokenizer
    held_out: HeldOut | None
    log: metrics.Log | None
    state: checkpoint.State
    fingerprint: fingerprint.Fingerprint


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
        seconds = f"{time.perf_counter() - began:.1f} s"
        trainer.log.say(
            f"run {task.run}: {_describe(trainer)}, steps {trainer.state.step} to {last}; ready in {seconds}"
        )
    try:
        stopped = _loop(trainer, last)
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
    config, run = task.config, task.run
    _quiet()
    folder, pairs, held_out = on_each(world, lambda: _read_data(config, world))
    heartbeat.tick()
    config, choices = on_first(world, lambda: settle(config, world.size, world.device))
    now = on_first(world, lambda: fingerprint.take(folder, world.device))
    resumed = on_first(world, lambda: _checkpoint_to_resume(replace(task, config=config), world, now))
    if resumed is None:
        text = on_first(world, lambda: train_tokenizer(all_captions(pairs), config.model.vocab_size).to_str())
        tokenizer, state = Tokenizer.from_str(text), checkpoint.State(0, 0, world.size, config.job.zero_stage)
    else:
        tokenizer, state = on_each(world, lambda: (checkpoint.read_tokenizer(resumed), checkpoint.read_state(resumed)))
    length, size = config.model.context_length, config.optimizer.batch_size
    sampler = on_each(world, lambda: Sampler(pairs, tokenizer, length, size, config.job.seed))
    heartbeat.tick()
    torch.manual_seed(config.job.seed)
    engine = make_engine(Clip(config.model, tokenizer.get_vocab_size(), config.job.precision), config, world)
    if resumed is not None:
        load_engine(engine, resumed)
    first = world.rank == 0
    bad = sum(pairs.bad.values())
    log = on_each(world, lambda: metrics.Log(run, state.step, config.optimizer.steps, bad) if first else None)
    return Trainer(config, choices, run, world, heartbeat, engine, sampler, tokenizer, held_out, log, state, now)


def _read_data(config: Config, world: World) -> tuple[Path, Pairs, HeldOut | None]:
    """The prepared folder, the training pairs, and on rank 0, which evaluates, the held-out ones too: what is wrong
    with them is said before the first step, and they are read once. Every rank asks for the data; a lock lets one
    prepare them."""
    _check_share(config.optimizer, world.size)
    folder, data = data_folder(config), config.data
    pairs = load_pairs(folder, "train", corrupt=data.corrupt, seed=data.seed, max_bad_fraction=data.max_bad_fraction)
    return folder, pairs, read_held_out(config, folder, pairs) if world.rank == 0 else None


def _check_share(options: OptimizerOptions, processes: int) -> None:
    if options.batch_size % processes:
        raise ConfigError(
            f"optimizer.batch_size={options.batch_size}; allowed: a multiple of the {processes} processes"
        )
    share = options.batch_size // processes
    if options.micro_batches > share:
        raise ConfigError(
            f"optimizer.micro_batches={options.micro_batches}; allowed: at most {share}, a process's share"
        )


def _checkpoint_to_resume(task: Task, world: World, now: fingerprint.Fingerprint) -> Path | None:
    """The newest good checkpoint, None where the run never wrote one; raises where it does not fit this job."""
    if not checkpoint.has_any(task.run):
        return None
    folder, stop_after = checkpoint.find(task.run, engine=True), task.stop_after
    state = checkpoint.read_state(folder)
    problem = checkpoint.describe_mismatch(state, world.size, task.config.job.zero_stage)
    if problem is not None:
        raise checkpoint.CheckpointError(f"{folder}: {problem}")
    if stop_after is not None and stop_after < state.step:
        raise ConfigError(f"--stop-after {stop_after}, but {folder} has done {state.step} steps; allowed: that or more")
    _compare(task.config, folder, now)
    return folder


def _compare(config: Config, folder: Path, now: fingerprint.Fingerprint) -> None:
    """Name all that differs from when the checkpoint was written. Other data, and other options that are a part of what
    is trained, are refused; with other code or versions the run goes on, but need not repeat bit for bit."""
    fixed, changeable = checkpoint.other_options(checkpoint.read_config(folder), config)
    if fixed:
        raise ConfigError(
            f"the run cannot go on from {folder} with other options than it was trained with: {'; '.join(fixed)}; set "
            "them back in the run's config.yaml (name what `auto` was), or start a new run"
        )
    if changeable:
        print(f"going on with other options than {folder.name} was written with: {'; '.join(changeable)}", flush=True)
    then = checkpoint.read_fingerprint(folder)
    if then is None:
        print(f"{folder.name} holds no {checkpoint.FINGERPRINT}: whether data and code are as they were is not known")
        return
    data = fingerprint.other_data(then, now)
    if data is not None:
        raise checkpoint.CheckpointError(
            f"{folder} was trained on other data (fingerprint {data}); let data.folder in the run's config.yaml name "
            "the data it was trained on, or start a new run"
        )
    software = fingerprint.other_software(then, now)
    if software:
        print(f"{folder.name} was written by other software, and may not go on bit for bit: {'; '.join(software)}")


def _loop(trainer: Trainer, last: int) -> str | None:
    """Train up to step `last`, or to the end of the step in which a rank is asked to stop: then returns the words for
    it."""
    options = trainer.config.job
    while trainer.state.step < last:
        began, step = time.perf_counter(), trainer.state.step
        trainer.heartbeat.enter(step, "training")
        batch = trainer.sampler.share(step, trainer.world.rank, trainer.world.size, trainer.world.device)
        trainer.engine.train()
        result = train_step(trainer.engine, batch, step, trainer.config, trainer.world.group)
        trainer.state = trainer.state.after(result.applied)
        _record(trainer, step, result, time.perf_counter() - began, batch.keys)
        if not result.applied:
            on_each(trainer.world, partial(_check_skipped, trainer, step))
        if options.evaluate_every and (step + 1) % options.evaluate_every == 0:
            trainer.heartbeat.enter(step, "evaluation")
            _evaluate_on_the_way(trainer, step)
        due = (step + 1) % options.checkpoint_every == 0 or step + 1 == last
        request = asked_to_stop(trainer.world)
        if due or request:
            trainer.heartbeat.enter(step, "saving")
            save(trainer)
        if request or (due and (request := asked_to_stop(trainer.world))):  # it takes a while to save
            folder = trainer.run / checkpoint.FOLDER / checkpoint.name_of(step + 1)
            return f"stopped by {name_of(request)} after step {step}: {folder}; go on with --resume {trainer.run}"
    return None


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


def _record(trainer: Trainer, step: int, result: StepResult, seconds: float, keys: tuple[str, ...]) -> None:
    """The step's row in the log, on the rank that has one."""
    log, config = trainer.log, trainer.config
    if log is None:
        return
    log.step(
        step,
        {
            "loss": result.loss,
            "alpha": config.loss.alpha()(step),
            "scale": result.scale,
            "r1_image_to_text": result.r1_image_to_text,
            "r1_text_to_image": result.r1_text_to_image,
            "lr": config.optimizer.lr_at(step),
            "grad_norm": result.grad_norm,
            "samples_per_second": config.optimizer.batch_size / seconds,
            "skipped": trainer.state.skipped,
        },
    )
    if not result.applied:
        log.nonfinite(step, keys)
        log.say(f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: skipped; see {metrics.NONFINITE}")


def save(trainer: Trainer) -> None:
    """A checkpoint of the present step; returns on all ranks once it is on disk. Where it cannot be, because the model
    is not finite or the disk is full, nothing of it stays, and all ranks raise together."""
    step, weights = trainer.state.step, gather_weights(trainer.engine, trainer.config.job.zero_stage)
    bad = nonfinite(trainer.engine, weights, trainer.world.group)
    on_each(trainer.world, partial(_check_finite, trainer, bad))
    try:
        scratch = on_first(trainer.world, lambda: checkpoint.begin(trainer.run, step))
        trainer.engine.save_checkpoint(str(scratch), tag=checkpoint.ENGINE, save_latest=False)
        on_each(trainer.world, trainer.engine.checkpoint_engine.raise_failure)
        on_first(trainer.world, partial(_commit, trainer, scratch, weights))
    except (OSError, ElsewhereError) as error:
        on_first(trainer.world, lambda: checkpoint.abandon(trainer.run, step))
        if not isinstance(error, OSError):
            raise
        raise checkpoint.RunError(
            f"the checkpoint of step {step} cannot be written ({explain(error)}); those before it are as they were. "
            f"Where the disk is full make room, and go on with --resume {trainer.run}"
        ) from error


def _commit(trainer: Trainer, scratch: Path, weights: dict[str, Tensor]) -> None:
    checkpoint.write_portable(scratch, weights, trainer.config, trainer.tokenizer, trainer.state, trainer.fingerprint)
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
    """Held-out R@1 by rank 0 while the others wait, in a model of its own. Training draws nothing from torch's global
    generator after set-up, so this leaves no trace in it."""
    weights = gather_weights(trainer.engine, trainer.config.job.zero_stage)

    def evaluate_here() -> None:
        assert trainer.log is not None and trainer.held_out is not None
        model = Clip(trainer.config.model, trainer.tokenizer.get_vocab_size())
        model.load_state_dict(weights)
        pairs = trainer.held_out.splits["heldout"]
        x = evaluate.embed_images(model.eval(), pairs.images)
        image_to_text, text_to_image = evaluate.retrieve(model, trainer.tokenizer, pairs, x)
        trainer.log.row(
            step,
            {
                "heldout_r1_image_to_text": image_to_text.recall[1],
                "heldout_r1_text_to_image": text_to_image.recall[1],
            },
        )

    on_first(trainer.world, evaluate_here)


def _finish(trainer: Trainer) -> None:
    """The table and the plot by rank 0, from the checkpoint on disk: what `python -m train.evaluate` will read."""
    trainer.heartbeat.enter(trainer.state.step, "evaluation")

    def evaluate_here() -> None:
        assert trainer.log is not None and trainer.held_out is not None
        folder = checkpoint.find(trainer.run)
        results = evaluate.evaluate_checkpoint(folder, trainer.held_out, stop.check)
        trainer.log.say(f"\n{report.text(results, trainer.held_out)}\n")  # first, for the disk may be full
        report.write(trainer.run, folder, results, trainer.held_out)
        trainer.log.say(f"{trainer.run / report.TABLE}, {metrics.plot(trainer.run)}")

    on_first(trainer.world, evaluate_here)


def _describe(trainer: Trainer) -> str:
    config, pairs, world = trainer.config, trainer.sampler.pairs, trainer.world
    model = Clip(config.model, trainer.tokenizer.get_vocab_size())  # under ZeRO-3 the engine's lacks most parameters
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{count / 1e6:.2f} M parameters, {len(pairs)} pairs (bad samples left out: {describe_bad(pairs.bad)}), "
        f"{world.size} × {world.device.type}, ZeRO-{config.job.zero_stage}, {trainer.choices}"
    )


def _quiet() -> None:
    """DeepSpeed reports every step of its set-up on every rank, and uses deprecated names of PyTorch's."""
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
