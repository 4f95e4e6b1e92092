"""The optimizers beside AdamW and SGD, which test_engine compares with a plain loop."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers import engines
from helpers.engines import config

from train.config import ConfigError
from train.optimizers import make_optimizer


def made(name: str, stage: int, **options: Any) -> torch.optim.Optimizer:
    groups = engines.bundle().parameter_groups(0.1, None)
    return make_optimizer(groups, config("0", name=name, **options).optimizer, stage)


@pytest.mark.parametrize("name", ("adamw", "sgd"))
def test_groups_and_options_reach_the_optimizer(name: str) -> None:
    optimizer = made(name, 3, betas=[0.8, 0.95], eps=1e-5, lr=0.25)
    first, second, _ = optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"], first["lr_scale"]) == (0.1, 0.0, 0.5)
    if name == "adamw":
        assert (first["betas"], first["eps"], first["lr"]) == ((0.8, 0.95), 1e-5, 0.25)
    else:
        assert (first["momentum"], first["lr"]) == (0.8, 0.25)


def test_without_timm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "timm.optim", raising=False)
    with pytest.raises(ConfigError, match=r"optimizer\.name='timm:lion' needs timm .*pip install 'softclip-kernels"):
        made("timm:lion", 0)


@pytest.mark.parametrize("name", ("lion", "nadamw", "adamw", "sgdw", "adan", "laprop", "adopt", "madgrad", "rmsproptf"))
def test_optimizers_of_timm_that_take_each_element_by_itself_serve_any_stage(name: str) -> None:
    pytest.importorskip("timm")
    optimizer = made(f"timm:{name}", 3, betas=[0.8, 0.95], eps=1e-5)
    betas = optimizer.param_groups[0].get("betas", ())
    assert len(betas) != 2 or betas == (0.8, 0.95)
    assert optimizer.param_groups[0].get("eps", 1e-5) == 1e-5
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]


@pytest.mark.parametrize(
    "name", ("lamb", "lambc", "lars", "adafactor", "adafactorbv", "adamp", "novograd", "muon", "clion")
)
def test_those_that_look_at_a_whole_parameter_are_refused_where_zero_cuts_it(name: str) -> None:
    pytest.importorskip("timm")
    assert made(f"timm:{name}", 0).param_groups
    with pytest.raises(ConfigError, match=rf"'timm:{name}' with job\.zero_stage=1: it looks at a parameter as a whole"):
        made(f"timm:{name}", 1)


def test_one_whose_state_is_there_before_zero_cuts_parameters_is_refused() -> None:
    """DeepSpeed would make a new Adagrad, of one group with the first one's options."""
    pytest.importorskip("timm")
    with pytest.raises(
        ConfigError, match=r"'timm:adagrad' with job\.zero_stage=2: it keeps state of parameters before"
    ):
        made("timm:adagrad", 2)


@pytest.mark.parametrize(
    ("name", "said"),
    (
        ("nosuch", r"a name of timm\.optim\.list_optimizers"),
        ("adahessian", "needs second derivatives"),
        ("fusedadam", r"cannot be made here \(.*APEX"),
    ),
)
def test_what_timm_lacks_or_this_trainer_cannot_have_is_refused(name: str, said: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=said):
        made(f"timm:{name}", 0)
