"""One process of a training job: its set-up, the loop over steps, checkpoints, and the evaluation at the end."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from train import checkpoint, evaluate, logs
from train.choices import settle
from train.config import Config, ConfigError, Optimizer
from train.data import Pairs, load_pairs
from train.launch import World, asked_to_stop, on_each, on_first
from train.model import Clip
from train.progress import Progress
from train.samples import Sampler, all_captions
from train.signals import name_of, stop
from train.step import StepResult, train_step
from train.tokenizer import train_tokenizer


class NonFiniteError(RuntimeError):
    """More batches had a non-finite loss or gradient than the configuration allows."""


@dataclass
class Job:
    """Everything a process holds while it trains. ``config``: with every `auto` of the training step settled.
    ``choices``: how, in words. ``log`` and ``heldout``: rank 0's alone."""

    config: Config
    choices: str
    run: Path
    world: World
    progress: Progress
    engine: Any
    sampler: Sampler
    tokenizer: Tokenizer
    heldout: evaluate.Data | None
    log: logs.Log | None
    state: checkpoint.State


def train(config: Config, run: Path, world: World, progress: Progress, stop_after: int | None = None) -> str | None:
    """Train to the last step, then evaluate; or train to step `stop_after`. Returns None, or, where a rank was asked to
    stop, what is left and how to go on; where that is in the evaluation at the end, rank 0 raises StoppedError."""
    began = time.perf_counter()
    job = _set_up(config, run, world, progress, stop_after)
    steps = config.optimizer.steps
    last = min(steps, stop_after or steps)
    # From here on a request waits for the end of a step. One that ended a rank before this line shows in this exchange.
    stop.act_at_once(None)
    asked_to_stop(job.world)
    if job.log is not None:
        ready = time.perf_counter() - began
        job.log.say(f"run {run}: {_describe(job)}, steps {job.state.step} to {last}; ready in {ready:.1f} s")
    try:
        stopped = _loop(job, last)
        if last == steps and stopped is None:
            _finish(job)
        progress.enter(job.state.step, "done")
    finally:
        if job.log is not None:
            job.log.close()
    # The engine before the groups that it uses: the other way round a process may abort at exit.
    job.engine.destroy()
    del job
    gc.collect()
    return stopped


def _set_up(config: Config, run: Path, world: World, progress: Progress, stop_after: int | None) -> Job:
    _quiet()
    pairs, heldout = on_each(world, lambda: _read_data(config, world))
    progress.tick()
    config, choices = on_first(world, lambda: settle(config, world.size, world.device))
    found = on_first(world, lambda: _checkpoint_to_resume(config, run, world, stop_after))
    if found is None:
        text = on_first(world, lambda: train_tokenizer(all_captions(pairs), config.model.vocab_size).to_str())
        tokenizer, state = Tokenizer.from_str(text), checkpoint.State(0, 0, world.size, config.job.zero_stage)
    else:
        tokenizer, state = checkpoint.read_tokenizer(found), checkpoint.read_state(found)
    length, size = config.model.context_length, config.optimizer.batch_size
    sampler = on_each(world, lambda: Sampler(pairs, tokenizer, length, size, config.job.seed))
    progress.tick()
    torch.manual_seed(config.job.seed)
    engine = make_engine(Clip(config.model, tokenizer.get_vocab_size(), config.job.precision), config, world)
    if found is not None:
        engine.load_checkpoint(str(found), tag=checkpoint.ENGINE)
    log = logs.Log(run, state.step, config.optimizer.steps) if world.rank == 0 else None
    return Job(config, choices, run, world, progress, engine, sampler, tokenizer, heldout, log, state)


def _read_data(config: Config, world: World) -> tuple[Pairs, evaluate.Data | None]:
    """The training pairs, and on rank 0, which evaluates, the held-out ones too: what is wrong with them is said before
    the first step, and they are read once. Every rank asks for the data; a lock lets one prepare them."""
    _check_share(config.optimizer, world.size)
    folder, data = evaluate.data_folder(config), config.data
    pairs = load_pairs(folder, "train", corrupt=data.corrupt, seed=data.seed, max_bad_fraction=data.max_bad_fraction)
    return pairs, evaluate.read_data(config, folder, pairs) if world.rank == 0 else None


def _check_share(options: Optimizer, processes: int) -> None:
    if options.batch_size % processes:
        raise ConfigError(
            f"optimizer.batch_size={options.batch_size}; allowed: a multiple of the {processes} processes"
        )
    share = options.batch_size // processes
    if options.micro_batches > share:
        raise ConfigError(
            f"optimizer.micro_batches={options.micro_batches}; allowed: at most {share}, a process's share"
        )


def _checkpoint_to_resume(config: Config, run: Path, world: World, stop_after: int | None) -> Path | None:
    """The newest whole checkpoint, None where the run never wrote one; raises where it does not fit this job."""
    if not any((run / checkpoint.FOLDER).glob("step-*")):
        return None
    folder = checkpoint.find(run)
    state = checkpoint.read_state(folder)
    problem = checkpoint.describe_mismatch(state, world.size, config.job.zero_stage)
    if problem is not None:
        raise checkpoint.CheckpointError(f"{folder}: {problem}")
    if stop_after is not None and stop_after < state.step:
        raise ConfigError(f"--stop-after {stop_after}, but {folder} has done {state.step} steps; allowed: that or more")
    return folder


def make_engine(model: Clip, config: Config, world: World) -> Any:
    """The DeepSpeed engine. Parameters are fp32 (bf16 is autocast), hence also the master copies that ZeRO keeps.

    Nothing is compiled at the start. The optimizer is PyTorch's: DeepSpeed's own for CPUs gains nothing at this size.
    And DeepSpeed's all-reduce through shared memory is left out: it waits for a lost rank for ever.
    """
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameter_groups(options.weight_decay), lr=options.lr, betas=(options.betas[0], options.betas[1])
    )
    settings = {
        "train_micro_batch_size_per_gpu": options.batch_size // world.size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.max_grad_norm,
        "zero_optimization": {"stage": config.job.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model.to(world.device), optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def _loop(job: Job, last: int) -> str | None:
    """Up to step `last`, or to the end of the step in which a rank is asked to stop: then the words for it."""
    options = job.config.job
    while job.state.step < last:
        began, step = time.perf_counter(), job.state.step
        job.progress.enter(step, "training")
        batch = job.sampler.share(step, job.world.rank, job.world.size, job.world.device)
        job.engine.train()
        result = train_step(job.engine, batch, step, job.config, job.world.group)
        job.state = replace(job.state, step=step + 1, skipped=job.state.skipped + (not result.applied))
        if job.log is not None:
            _record(job.log, job, step, result, time.perf_counter() - began, batch.keys)
        if not result.applied:
            on_each(job.world, partial(_check_skipped, job, step))
        if options.evaluate_every and (step + 1) % options.evaluate_every == 0:
            job.progress.enter(step, "evaluation")
            _evaluate_on_the_way(job, step)
        due = (step + 1) % options.checkpoint_every == 0 or step + 1 == last
        request = asked_to_stop(job.world)
        if due or request:
            job.progress.enter(step, "saving")
            save(job)
        if request or (due and (request := asked_to_stop(job.world))):  # it takes a while to save
            folder = job.run / checkpoint.FOLDER / checkpoint.name_of(step + 1)
            return f"stopped by {name_of(request)} after step {step}: {folder}; go on with --resume {job.run}"
    return None


def _check_skipped(job: Job, step: int) -> None:
    """Every rank counts the same, so all of them stop together, and the first says why."""
    options = job.config.job
    allowed = options.max_skipped if options.on_nonfinite == "skip" else 0
    if job.state.skipped > allowed:
        raise NonFiniteError(
            f"the loss or gradient of step {step} is not finite; batches skipped: {job.state.skipped}, allowed: "
            f"{allowed} (job.on_nonfinite, job.max_skipped). Their samples are named in {job.run / logs.NONFINITE}"
        )


def _record(log: logs.Log, job: Job, step: int, result: StepResult, seconds: float, keys: tuple[str, ...]) -> None:
    log.step(
        step,
        {
            "loss": result.loss,
            "alpha": job.config.loss.alpha()(step),
            "scale": result.scale,
            "r1_image_to_text": result.r1_image_to_text,
            "r1_text_to_image": result.r1_text_to_image,
            "lr": job.config.optimizer.lr_at(step),
            "grad_norm": result.grad_norm,
            "samples_per_second": job.config.optimizer.batch_size / seconds,
            "skipped": job.state.skipped,
        },
    )
    if not result.applied:
        log.nonfinite(step, keys)
        log.say(f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: skipped; see {logs.NONFINITE}")


def weights(job: Job) -> dict[str, Tensor]:
    """The whole model's parameters; under ZeRO-3 they are gathered, which every rank must take part in."""
    module = job.engine.module
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=job.config.job.zero_stage == 3):
        return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def save(job: Job) -> None:
    """A checkpoint of the present step; returns on all ranks once it is on disk."""
    step, tensors = job.state.step, weights(job)
    scratch = on_first(job.world, lambda: checkpoint.begin(job.run, step))
    job.engine.save_checkpoint(str(scratch), tag=checkpoint.ENGINE, save_latest=False)
    dist.barrier(group=job.world.group)

    def commit() -> None:
        for script in scratch.glob("*.py"):  # DeepSpeed's conversion scripts: a checkpoint holds no code
            script.unlink()
        checkpoint.write_portable(scratch, tensors, job.config, job.tokenizer, job.state)
        checkpoint.commit(job.run, scratch, step, job.config.job.keep_checkpoints)

    on_first(job.world, commit)


def _evaluate_on_the_way(job: Job, step: int) -> None:
    """Held-out R@1 by rank 0 while the others wait, in a model of its own. Training draws nothing from torch's global
    generator after set-up, so this leaves no trace in it."""
    tensors = weights(job)

    def run() -> None:
        assert job.log is not None and job.heldout is not None
        model = Clip(job.config.model, job.tokenizer.get_vocab_size())
        model.load_state_dict(tensors)
        pairs = job.heldout.splits["heldout"]
        x = evaluate.embed_images(model.eval(), pairs.images)
        image_to_text, text_to_image = evaluate.retrieve(model, job.tokenizer, pairs, x)
        job.log.row(
            step,
            {
                "heldout_r1_image_to_text": image_to_text.recall[1],
                "heldout_r1_text_to_image": text_to_image.recall[1],
            },
        )

    on_first(job.world, run)


def _finish(job: Job) -> None:
    """The table and the plot, from the checkpoint on disk: what `python -m train.evaluate` will read."""
    job.progress.enter(job.state.step, "evaluation")

    def run() -> None:
        assert job.log is not None and job.heldout is not None
        folder = checkpoint.find(job.run)
        results = evaluate.evaluate_checkpoint(folder, job.heldout, stop.check)
        evaluate.write(job.run, folder, results)
        job.log.say(f"\n{evaluate.table(results)}\n\n{job.run / evaluate.TABLE}, {logs.plot(job.run)}")

    on_first(job.world, run)


def _describe(job: Job) -> str:
    count = sum(parameter.numel() for parameter in Clip(job.config.model, job.tokenizer.get_vocab_size()).parameters())
    return (
        f"{count / 1e6:.2f} M parameters, {len(job.sampler.pairs)} pairs, {job.world.size} × {job.world.device.type}, "
        f"ZeRO-{job.config.job.zero_stage}, {job.choices}"
    )


def _quiet() -> None:
    """DeepSpeed reports every step of its set-up on every rank, and calls some of PyTorch's by their old names."""
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
