"""A batch cut into micro-batches: every row once, in order, within what was asked for."""

from __future__ import annotations

from collections import UserDict
from itertools import pairwise

import pytest
import torch

from softclip_kernels import TwoPass, softclip_loss, split_batch

ROWS = torch.arange(10)
BATCH = {"images": ROWS[:, None] + torch.zeros(10, 3), "texts": (ROWS, [ROWS % 3, None]), "scale": torch.tensor(2.0)}


@pytest.mark.parametrize(
    ("options", "sizes"),
    (
        ({"count": 3}, [4, 3, 3]),
        ({"count": 1}, [10]),
        ({"count": 12}, [1] * 10 + [0, 0]),
        ({"size": 4}, [4, 4, 2]),
        ({"size": 5}, [5, 5]),
        ({"size": 11}, [10]),
        ({"tokens": 12, "lengths": [3, 3, 3, 3, 6, 1, 12, 1, 1, 1]}, [4, 2, 1, 3]),
        ({"tokens": 12, "lengths": torch.tensor([1, 1, 1, 1, 1, 1, 3, 1, 1, 0])}, [6, 4]),
    ),
)
def test_rows_stay_in_order(options, sizes):
    parts = split_batch(BATCH, **options)
    assert [len(part["images"]) for part in parts] == sizes
    for rows in ([part["texts"][0] for part in parts], [part["images"][:, 0].long() for part in parts]):
        assert torch.equal(torch.cat(rows), ROWS)
    for part in parts:
        assert torch.equal(part["texts"][1][0], part["texts"][0] % 3) and part["texts"][1][1] is None
        assert part["scale"] is BATCH["scale"] and part["images"].untyped_storage().data_ptr() == (
            BATCH["images"].untyped_storage().data_ptr()
        )


def test_a_budget_is_of_padded_tokens():
    """Rows times the longest; and not a row less than fits."""
    lengths = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0))
    parts = [each for (each,) in split_batch((lengths,), tokens=64, lengths=lengths)]
    assert torch.equal(torch.cat(parts), lengths)
    assert all(len(part) * part.max() <= 64 for part in parts)
    for part, following in pairwise(parts):
        assert (len(part) + 1) * max(part.max(), following[0]) > 64


def test_a_batch_without_rows_is_one_micro_batch():
    for options in ({"size": 4}, {"tokens": 4, "lengths": []}, {"count": 1}):
        assert [len(rows) for (rows,) in split_batch((ROWS[:0],), **options)] == [0]


def test_mappings_and_sequences_go_to_two_passes():
    tower = torch.nn.Linear(3, 4)
    x, y = torch.randn(10, 3), torch.randn(10, 4)
    for batch in ((x, y), UserDict(x=x, y=y)):
        passes = TwoPass(lambda x, y: (tower(x), y, torch.tensor(2.0)), split_batch(batch, size=4))
        passes.backward(softclip_loss(*passes.outputs))
        assert len(passes.micro_batches) == 3


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    (
        (BATCH, {}, ValueError, "exactly one of count, size and tokens is needed, not none"),
        (BATCH, {"count": 2, "size": 3}, ValueError, r"not \['count', 'size'\]"),
        (BATCH, {"size": 0}, ValueError, "size=0; at least 1"),
        (BATCH, {"size": 2, "lengths": [1] * 10}, ValueError, "tokens and lengths go together"),
        (BATCH, {"tokens": 2}, ValueError, "tokens and lengths go together"),
        (BATCH, {"tokens": 2, "lengths": [1] * 9}, ValueError, "lengths has 9 entries; the batch has 10 rows"),
        (BATCH, {"tokens": 2, "lengths": [1] * 9 + [3]}, ValueError, "row 9 has 3 tokens, more than tokens=2"),
        ((ROWS, {"y": ROWS[1:]}), {"size": 2}, ValueError, r"one number of rows, not \{'0': 10, '1.y': 9\}"),
        ((None,), {"size": 2}, ValueError, r"one number of rows, not \{\}"),
        ((ROWS, ["a"] * 10), {"size": 2}, TypeError, "1.0 is a str; allowed: tensors, numbers and None"),
    ),
)
def test_bad_values(batch, options, error, message):
    with pytest.raises(error, match=message):
        split_batch(batch, **options)
