"""The type of the loss follows from its reduction: mypy reads this file (make lint), and it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

from softclip_kernels import Losses, RetrievalRanks, softclip_loss, softclip_loss_with_ranks


def test_the_result_of_a_reduction_known_by_name_needs_no_assertion() -> None:
    x, scale = torch.eye(4), torch.tensor(9.0)
    loss = softclip_loss(x, x, scale)
    assert isinstance(assert_type(loss, Tensor), Tensor)
    summed = softclip_loss(x, x, scale, reduction="sum", group=None)
    assert isinstance(assert_type(summed, Tensor), Tensor)
    one_way = softclip_loss(x, x, scale, direction="rows")
    assert isinstance(assert_type(one_way, Tensor), Tensor)
    losses = softclip_loss(x, x, scale, reduction="none", backend="reference")
    assert isinstance(assert_type(losses, Losses), Losses)
    losses = softclip_loss(x, x, scale, reduction="none", direction="columns")
    assert isinstance(assert_type(losses, Losses), Losses)
    loss, ranks = softclip_loss_with_ranks(x, x, scale, backend="reference", direction="rows")
    assert isinstance(assert_type(loss, Tensor), Tensor) and isinstance(ranks, RetrievalRanks)


def test_one_that_is_chosen_later_may_be_either() -> None:
    x, scale = torch.eye(4), torch.tensor(9.0)
    for reduction in ("mean", "none"):
        either = softclip_loss(x, x, scale, reduction=reduction)
        assert_type(either, Tensor | Losses)
        loss, ranks = softclip_loss_with_ranks(x, x, scale, reduction=reduction)
        assert_type(loss, Tensor | Losses)
        assert isinstance(assert_type(ranks, RetrievalRanks), RetrievalRanks)
