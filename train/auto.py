"""What `auto` stands for in a run: decided once by rank 0, held by all ranks, and said in words. So nothing falls back
silently: a backend that was chosen here is asked for by name at every step, and raises where it cannot run."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from softclip_kernels import backends
from softclip_kernels.problem import Problem

from .config import Config, ConfigError, OptimizerOptions
from .towers.bundle import Bundle

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # on x86 two, on ARM the last


def precision(asked: str, device: torch.device) -> str:
    """bf16 where the hardware multiplies it; else fp16 on a GPU, and on a CPU, which would emulate either, fp32."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    known = torch.cpu.get_capabilities()
    return "bf16" if any(known.get(name) for name in BF16_INSTRUCTIONS) else "fp32"


def backend(asked: str, rows: int, width: int, device: torch.device) -> tuple[str, str]:
    """The backend of a rank's block of `rows` × `rows` pairs with in-batch R@1, and why those that `auto` prefers to it
    were passed over. Raises ConfigError where the one that was asked for cannot run here."""
    # Embeddings reach the loss in fp32 whatever the towers' precision, a teacher's as well as the student's own.
    x, zeros = torch.zeros(rows, width, device=device), torch.zeros(rows, device=device)
    positive = torch.arange(rows, device=device)
    problem = Problem(x, x, zeros[0], positive, row_threshold=zeros, column_threshold=zeros)
    if asked == "auto":
        chosen, passed_over = backends.choose(problem)
        return chosen.name, backends.in_words(passed_over)
    try:
        return backends.select(asked, problem).name, ""
    except RuntimeError as error:
        raise ConfigError(f"loss.{error}") from error


def micro_batches(options: OptimizerOptions, share: int, tokens_per_pair: int) -> int:
    """Parts that a process cuts its `share` of the batch into, so that none holds more tokens than asked for. Raises
    ConfigError where that is less than a pair has."""
    if options.micro_batch_tokens is None:
        return options.micro_batches
    pairs = options.micro_batch_tokens // tokens_per_pair
    if pairs == 0:
        raise ConfigError(
            f"optimizer.micro_batch_tokens={options.micro_batch_tokens}; allowed: {tokens_per_pair} or more, the "
            "tokens of one pair with these towers"
        )
    return math.ceil(share / pairs)


def settle(config: Config, bundle: Bundle, processes: int, device: torch.device) -> tuple[Config, str]:
    """`config` with every `auto` of the training step replaced, and the choices in words."""
    width = precision(config.job.precision, device)
    share = config.optimizer.batch_size // processes
    name, passed_over = backend(config.loss.backend, share, bundle.width, device)
    parts = micro_batches(config.optimizer, share, bundle.tokens_per_pair)
    settled = replace(
        config,
        loss=replace(config.loss, backend=name),
        optimizer=replace(config.optimizer, micro_batches=parts, micro_batch_tokens=None),
        job=replace(config.job, precision=width),
    )
    words = f"{width}{' (auto)' if config.job.precision == 'auto' else ''}, "
    if parts > 1:
        most = math.ceil(share / parts)
        words += f"{parts} micro-batches of up to {most} pairs, {most * bundle.tokens_per_pair} tokens, "
    words += f"backend {name}"
    return settled, f"{words} ({passed_over})" if passed_over else words
