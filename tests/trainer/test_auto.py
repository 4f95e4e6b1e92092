"""What `auto` stands for in a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.data import tiny

from softclip_kernels import backends
from train import auto
from train.config import Config, ConfigError

CPU = torch.device("cpu")


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


def test_the_backend_is_chosen_once_and_said_with_what_was_passed_over(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.from_dict(tiny(data))
    names = tuple(backends.registered())
    for name in names[:-1]:
        monkeypatch.setattr(backends.registered()[name], "why_not", lambda problem: "it has a day off", raising=True)
    settled, words = auto.settle(config, 2, CPU)
    assert settled.loss.backend == names[-1]
    assert settled.job.precision in ("bf16", "fp32")
    passed_over = "; ".join(f"{name}: it has a day off" for name in names[:-1])
    assert words == f"{settled.job.precision} (auto), backend {names[-1]} ({passed_over})"
    named = replace(config, loss=replace(config.loss, backend=names[-1]), job=replace(config.job, precision="fp32"))
    assert auto.settle(named, 2, CPU) == (named, f"fp32, backend {names[-1]}")
    with pytest.raises(ConfigError, match=rf"loss\.backend='{names[0]}' cannot compute this: it has a day off"):
        auto.settle(replace(config, loss=replace(config.loss, backend=names[0])), 2, CPU)
