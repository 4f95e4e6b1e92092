"""The batch of each step and a rank's share of it, and the tokens of its captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import CONCEPTS, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from train.config import Config, ConfigError
from train.data import Batch, Pairs, Sampler, batch_indices
from train.model import Clip
from train.tokenizer import PAD_ID, encode

CPU = torch.device("cpu")


def joined(shares: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([one.images for one in shares]), torch.cat([one.tokens for one in shares])


def test_a_batch_does_not_depend_on_the_number_of_ranks(pairs: Pairs, tokenizer: Tokenizer) -> None:
    sampler = Sampler(pairs, tokenizer, 12, 24, seed=3)
    whole = joined([sampler.share(5, 0, 1, CPU)])
    for ranks in (2, 3, 4):
        cut = joined([sampler.share(5, rank, ranks, CPU) for rank in range(ranks)])
        assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))
    again = Sampler(pairs, tokenizer, 12, 24, seed=3).share(5, 0, 1, CPU)
    assert torch.equal(again.images, whole[0])
    assert again.keys == sampler.share(5, 1, 2, CPU).keys
    assert not torch.equal(sampler.share(6, 0, 1, CPU).images, whole[0])
    assert not torch.equal(Sampler(pairs, tokenizer, 12, 24, seed=4).share(5, 0, 1, CPU).images, whole[0])


def test_a_batch_takes_each_concept_once_and_reaches_every_drawing(pairs: Pairs, tokenizer: Tokenizer) -> None:
    concept_of = dict(zip(pairs.keys, pairs.concepts.tolist(), strict=True))
    sampler = Sampler(pairs, tokenizer, 12, CONCEPTS, seed=0)
    drawn: set[str] = set()
    for step in range(12):  # each of the two drawings of a concept is missed with a chance of 2^-12
        keys = sampler.share(step, 0, 1, CPU).keys
        assert len({concept_of[key] for key in keys}) == CONCEPTS
        drawn.update(keys)
    assert len(drawn) > 0.95 * len(pairs)
    with pytest.raises(
        ConfigError, match=rf"batch_size={CONCEPTS + 1}; allowed: at most {CONCEPTS}, the number of conc"
    ):
        Sampler(pairs, tokenizer, 12, CONCEPTS + 1, seed=0)


def test_captions_belong_to_their_drawings(pairs: Pairs, tokenizer: Tokenizer) -> None:
    sampler = Sampler(pairs, tokenizer, 12, CONCEPTS, seed=0)
    captions = dict(zip(pairs.keys, pairs.captions, strict=True))
    chosen = set()
    for step in range(3):
        batch = sampler.share(step, 0, 1, CPU)
        for key, tokens in zip(batch.keys, batch.tokens, strict=True):
            allowed = encode(tokenizer, list(captions[key]), 12)
            position = (allowed == tokens).all(1).nonzero().flatten().tolist()
            assert position, f"{key} came with another's caption"
            chosen.update(position)
    assert chosen == {0, 1, 2}, "every caption of a drawing has its turn"


def test_tokens_are_cut_and_padded(tokenizer: Tokenizer) -> None:
    tokens = encode(tokenizer, ["thing 1", "a drawing of thing 1 and of many other things besides"], 8)
    assert tokens.shape == (2, 8)
    assert (tokens[0] == PAD_ID).any()
    assert not (tokens[1] == PAD_ID).any()
    assert encode(tokenizer, ["THING 1"], 8).tolist() == tokens[:1].tolist(), "case is no difference"


def test_padding_does_not_change_an_embedding(data: Path, tokenizer: Tokenizer) -> None:
    model = Clip(Config.from_dict(tiny(data)).model, tokenizer.get_vocab_size()).eval()
    tokens = encode(tokenizer, ["thing 1"], 12)
    length = int((tokens != PAD_ID).sum())
    torch.testing.assert_close(model(None, tokens)[1], model(None, tokens[:, :length])[1])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_batches_cover_epochs_and_repeat_no_sample(one: int, other: int, seed: int) -> None:
    n, batch = max(one, other), min(one, other)
    steps = [batch_indices(n, batch, step, seed) for step in range(4 * n // batch + 3)]
    assert all(step.shape == (batch,) and step.dtype == np.int64 for step in steps)
    assert all(len(set(step.tolist())) == batch for step in steps)
    if n >= 2 * batch:
        stream = np.concatenate(steps)
        for start in range(0, len(stream) - n + 1, n):
            assert sorted(stream[start : start + n]) == list(range(n)), "an epoch shows every sample once"
    last = len(steps) - 1
    assert np.array_equal(batch_indices(n, batch, last, seed), steps[last]), "a pure function of the step"


def test_batches_differ_by_seed_and_epoch_and_refuse_nonsense() -> None:
    assert not np.array_equal(batch_indices(100, 50, 0, 0), batch_indices(100, 50, 0, 1))
    assert not np.array_equal(batch_indices(100, 50, 0, 0), batch_indices(100, 50, 2, 0))
    batch_indices(100, 30, 0, 0)[:] = 0  # a caller's change must not reach the next caller
    assert len(set(batch_indices(100, 30, 0, 0).tolist())) == 30
    for n, batch in ((10, 0), (10, 11)):
        with pytest.raises(ValueError, match=rf"batch={batch} must lie in \[1, n=10\]"):
            batch_indices(n, batch, 0, 0)
