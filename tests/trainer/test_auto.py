"""What `auto` stands for in a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import engines

from softclip_kernels import backends
from train import auto
from train.config import Config, ConfigError

CPU = torch.device("cpu")
BUNDLE = engines.bundle()


@pytest.mark.parametrize(
    ("known", "width"),
    (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True, "avx512_bf16": False}, "bf16"), ({"avx2": True}, "fp32")),
)
def test_automatic_precision_follows_the_instructions(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], width: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert auto.precision("auto", CPU) == width
    assert auto.precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(("supported", "width"), ((True, "bf16"), (False, "fp16")))
def test_a_gpu_without_bf16_takes_fp16(monkeypatch: pytest.MonkeyPatch, supported: bool, width: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert auto.precision("auto", torch.device("cuda")) == width


def test_the_backend_is_chosen_once_and_said_with_what_was_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.from_dict({"optimizer": {"batch_size": 16}})
    names = tuple(backends.registered())
    for name in names[:-1]:
        monkeypatch.setattr(backends.registered()[name], "why_not", lambda problem: "it has a day off", raising=True)
    settled, words = auto.settle(config, BUNDLE, 2, CPU)
    assert settled.loss.backend == names[-1]
    assert settled.job.precision in ("bf16", "fp32")
    passed_over = "; ".join(f"{name}: it has a day off" for name in names[:-1])
    assert words == f"{settled.job.precision} (auto), backend {names[-1]} ({passed_over})"
    named = replace(config, loss=replace(config.loss, backend=names[-1]), job=replace(config.job, precision="fp32"))
    assert auto.settle(named, BUNDLE, 2, CPU) == (named, f"fp32, backend {names[-1]}")
    with pytest.raises(ConfigError, match=rf"loss\.backend='{names[0]}' cannot compute this: it has a day off"):
        auto.settle(replace(config, loss=replace(config.loss, backend=names[0])), BUNDLE, 2, CPU)


@pytest.mark.parametrize(
    ("budget", "parts", "tokens"),
    # Of 7 tokens a pair, and 10 pairs a process: 3 pairs at a time are 4 parts, though 70 tokens are 3 budgets of 24.
    ((70, 1, 70), (1000, 1, 70), (69, 2, 35), (24, 4, 21), (7, 10, 7)),
)
def test_a_budget_of_tokens_bounds_every_micro_batch(budget: int, parts: int, tokens: int) -> None:
    config = Config.from_dict(
        {"optimizer": {"batch_size": 20, "micro_batch_tokens": budget}, "job": {"precision": "fp32"}}
    )
    settled, words = auto.settle(config, BUNDLE, 2, CPU)
    assert (settled.optimizer.micro_batches, settled.optimizer.micro_batch_tokens) == (parts, None)
    assert max(len(part) for part in torch.arange(10).tensor_split(parts)) * 7 == tokens <= budget
    said = f"{parts} micro-batches of up to {tokens // 7} pairs, {tokens} tokens"
    assert (said in words) == (parts > 1), words


def test_a_budget_below_a_pair_is_an_error() -> None:
    config = Config.from_dict({"optimizer": {"batch_size": 20, "micro_batch_tokens": 6}})
    with pytest.raises(ConfigError, match=r"optimizer\.micro_batch_tokens=6; allowed: 7 or more"):
        auto.settle(config, BUNDLE, 2, CPU)
