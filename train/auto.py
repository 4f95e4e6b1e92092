"""What `auto` stands for in a run: decided once by rank 0, held by all ranks, and said in words. So nothing falls back
silently: a backend that was chosen here is asked for by name at every step, and raises where it cannot run."""

from __future__ import annotations

from dataclasses import replace

import torch

from softclip_kernels import backends
from softclip_kernels.problem import Problem

from .config import Config, ConfigError

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # on x86 two, on ARM the last


def precision(asked: str, device: torch.device) -> str:
    """bf16 where the hardware multiplies it; a CPU that must emulate it is faster in fp32."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    known = torch.cpu.get_capabilities()
    return "bf16" if any(known.get(name) for name in BF16_INSTRUCTIONS) else "fp32"


def backend(asked: str, rows: int, width: int, device: torch.device) -> tuple[str, str]:
    """The backend of a rank's block of `rows` × `rows` pairs with in-batch R@1, and why those that `auto` prefers to it
    were passed over. Raises ConfigError where the one that was asked for cannot run here."""
    # Embeddings reach the loss in fp32 whatever the towers' precision; a teacher's are the student's own.
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


def settle(config: Config, processes: int, device: torch.device) -> tuple[Config, str]:
    """`config` with every `auto` of the training step replaced, and the choices in words."""
    width = precision(config.job.precision, device)
    share = config.optimizer.batch_size // processes
    name, passed_over = backend(config.loss.backend, share, config.model.embed_dim, device)
    settled = replace(config, loss=replace(config.loss, backend=name), job=replace(config.job, precision=width))
    words = f"{width}{' (auto)' if config.job.precision == 'auto' else ''}, backend {name}"
    return settled, f"{words} ({passed_over})" if passed_over else words
