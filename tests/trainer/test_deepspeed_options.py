"""The free-form section `deepspeed`: what it may say, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.engines import config

from train.config import ConfigError
from train.deepspeed_options import OURS, OURS_OF_ZERO, settings


@pytest.mark.parametrize("key", OURS)
def test_what_an_option_of_ours_says_is_refused_by_its_name(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings(config("1", deepspeed={key: 1}), 2, False)
    assert str(error.value) == f"deepspeed.{key} is what {OURS[key]} says; set that instead"


@pytest.mark.parametrize("key", OURS_OF_ZERO)
def test_so_is_what_one_says_of_zero(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings(config("1", deepspeed={"zero_optimization": {key: 1}}), 2, False)
    assert str(error.value) == f"deepspeed.zero_optimization.{key} is what {OURS_OF_ZERO[key]} says; set that instead"


def test_every_option_that_is_named_exists() -> None:
    known = config("1").to_dict()
    for names in (*OURS.values(), *OURS_OF_ZERO.values()):
        for name in (word for word in names.split() if "." in word):
            section, _, option = name.partition(".")
            assert option in known[section], name


@pytest.mark.parametrize(
    ("section", "said"),
    (
        ({"train_batchsize": 4}, "deepspeed.train_batchsize means nothing here; allowed: zero_optimization, "),
        ({"zero_optimization": 2}, "deepspeed.zero_optimization=2; allowed: a mapping"),
        ({"zero_optimization": {"bucket": 2}}, "deepspeed.zero_optimization.bucket is unknown to DeepSpeed; allowed: "),
        (
            {"zero_optimization": {"reduce_bucket_size": "big"}},
            "deepspeed.zero_optimization.reduce_bucket_size='big': Input should be a valid integer",
        ),
        ({"zero_optimization": {"zenflow": {}}}, "zenflow={} is not supported here; leave it out"),
    ),
)
def test_what_deepspeed_would_pass_over_or_stumble_on_is_named(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings(config("1", deepspeed=section), 2, False)
    assert said in str(error.value)


def test_everything_else_is_passed_on() -> None:
    zero = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 10, "overlap_comm": True}
    section = {"zero_optimization": zero, "communication_data_type": "fp32", "steps_per_print": 5}
    options = config("3 offload both", deepspeed=section)
    made = settings(options, 2, True)
    place = {"device": "cpu", "pin_memory": True}
    assert made["zero_optimization"] == {**zero, "stage": 3, "offload_optimizer": place, "offload_param": place}
    assert made["communication_data_type"] == "fp32" and made["steps_per_print"] == 5
    assert options.deepspeed == section, "the configuration is not written into"


def test_deepspeed_clips_but_at_stage_0() -> None:
    """Where it would do so whatever the gradient is."""
    assert settings(config("0"), 2, False)["gradient_clipping"] == 0.0
    assert settings(config("1"), 2, False)["gradient_clipping"] == config("1").optimizer.max_grad_norm
