"""What is legal and most likely not meant is named once a process; what is meant is never spoken of."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import PYTHONPATH
from torch import nn

from softclip_kernels import Dense, Hard, SoftClipLoss, Weighted, WiringWarning, guard_rails, softclip_loss
from softclip_kernels.testing import unit_rows


@pytest.fixture(autouse=True)
def _a_new_process(monkeypatch):
    monkeypatch.setattr(guard_rails, "_said", set())
    monkeypatch.setattr(guard_rails, "_looked", False)


def rows(n=6, seed=0, dtype=torch.float32):
    return unit_rows(n, 8, seed=seed, dtype=dtype).requires_grad_()


SCALE = torch.tensor(10.0)
RANKS = 2  # of the fixture `pool`
LABELS = torch.tensor([0, 1, 2, 3, 3, 2])
MISTAKES = {
    "x of another norm": (
        lambda: softclip_loss(3 * rows(), rows(), SCALE),
        "median norm of the embeddings x is 3, not",
    ),
    "y of another norm": (lambda: softclip_loss(rows(), 0.1 * rows(), SCALE), "embeddings y is 0.1, not 1"),
    "a logarithm": (
        lambda: softclip_loss(rows(), rows(), nn.Parameter(torch.tensor(2.6593))),
        r"trainable parameter of value 2.659, .*pass its exponential",
    ),
    "a rectangle": (
        lambda: softclip_loss(rows(), rows(4), SCALE, Hard(LABELS)),
        "6 rows and 4 columns.*is direction='rows'",
    ),
    "a bias": (lambda: SoftClipLoss()(rows(), rows(), SCALE, torch.zeros(1)), "does not feel logit_bias"),
}
MEANT = {
    "plain": lambda: softclip_loss(rows(), rows(seed=1), SCALE),
    "in bfloat16": lambda: softclip_loss(rows(dtype=torch.bfloat16), rows(dtype=torch.bfloat16), SCALE),
    "one zero embedding": lambda: softclip_loss(rows() * torch.ones(6, 1).index_fill(0, LABELS[:1], 0), rows(), SCALE),
    "an exponential": lambda: softclip_loss(rows(), rows(), nn.Parameter(torch.tensor(2.6593)).exp()),
    "a parameter that is no logarithm": lambda: softclip_loss(rows(), rows(), nn.Parameter(torch.tensor(14.3))),
    "a small scale that is fixed": lambda: softclip_loss(rows(), rows(), torch.tensor(1.0)),
    "a number": lambda: softclip_loss(rows(), rows(), 1.0),
    "a rectangle in one direction": lambda: softclip_loss(rows(), rows(4), SCALE, Weighted(Hard(LABELS), (2.0, 0.0))),
    "a rectangle's rows": lambda: softclip_loss(rows(), rows(4), SCALE, Hard(LABELS), direction="rows"),
    "a rectangle, summed": lambda: softclip_loss(rows(), rows(4), SCALE, Hard(LABELS), reduction="sum"),
    "an evaluation": lambda: softclip_loss(3 * rows().detach(), rows(4).detach(), SCALE, Hard(LABELS)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_once_and_at_the_callers_line(mistake):
    call, words = MISTAKES[mistake]
    with pytest.warns(WiringWarning, match=words) as caught:
        call()
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings(action="error"):
        call()


@pytest.mark.parametrize("meant", MEANT)
def test_what_is_meant_is_not_spoken_of(meant):
    with warnings.catch_warnings(action="error"):
        MEANT[meant]()


def test_a_filter_may_make_an_error_of_it_at_every_call():
    for _ in range(2):
        with warnings.catch_warnings(action="error"), pytest.raises(WiringWarning):
            MISTAKES["x of another norm"][0]()


def test_a_dense_rectangle_is_named_too():
    with pytest.warns(WiringWarning, match="6 rows and 4 columns"):
        softclip_loss(rows(), rows(4), SCALE, Dense(torch.ones(6, 4)))


def test_a_compiled_graph_stays_whole():
    """Nothing is said in it, and nothing breaks it."""
    x, y, bias = rows(), rows(4), torch.zeros(1, requires_grad=True)
    loss = torch.compile(SoftClipLoss(Hard(LABELS)), backend="eager", fullgraph=True)
    with warnings.catch_warnings(action="error", category=WiringWarning):
        loss(3 * x, y, SCALE, bias).backward()
    with warnings.catch_warnings(action="error", category=WiringWarning), pytest.raises(WiringWarning):
        SoftClipLoss(Hard(LABELS))(3 * x, y, SCALE, bias)


IN_A_FRESH_PROCESS = """
import torch, softclip_kernels
x = torch.ones(4, 8, requires_grad=True)
for _ in range(3):
    softclip_kernels.softclip_loss(x, x, 10.0)
"""


def test_a_process_says_it_once_by_default():
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        check=True,
    )
    assert done.stderr.count("WiringWarning: the median norm of the embeddings x is 2.83") == 1


def warnings_of(call):
    guard_rails._said.clear()
    with warnings.catch_warnings(record=True, action="always", category=WiringWarning) as caught:
        call()
    return [str(warning.message) for warning in caught if warning.category is WiringWarning]


def over_ranks(group):
    rank = dist.get_rank()
    own = torch.arange(6)
    labels = {
        "local": Hard(own),
        "said": Hard(own, local=True),
        "global": Hard(own + 6 * rank),
        "shuffled": Hard(11 - own),
    }
    found = {
        name: warnings_of(lambda target=target: softclip_loss(rows(), rows(), SCALE, target, group=group))
        for name, target in labels.items()
    }
    with torch.no_grad():
        found["local, an evaluation"] = warnings_of(
            lambda: softclip_loss(rows(), rows(), SCALE, labels["local"], group=group)
        )
    found["alone"] = warnings_of(lambda: softclip_loss(rows(), rows(), SCALE))
    found["alone, an evaluation"] = warnings_of(lambda: softclip_loss(rows().detach(), rows().detach(), SCALE))
    found["world"] = warnings_of(lambda: softclip_loss(rows(), rows(), SCALE, group="world"))
    return found


def test_over_ranks(pool):
    first, second = pool.run(over_ranks)
    for found in (first, second):
        assert any("one of" in message and "group='world'" in message for message in found.pop("alone"))
    (message,) = second.pop("local")
    assert "Hard(labels, local=True)" in message and "begin at 6" in message
    assert not any(first.values()) and not any(second.values())
