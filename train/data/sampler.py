"""The batch of each training step, and a rank's share of it: functions of (seed, step) only, whatever the number of
ranks, so that a resumed run needs no state to go on with the same batches.

A batch holds at most one drawing of each concept. Vendors draw the same things, and a batch of 512 taken at random from
the emoji set has another vendor's drawing of the same concept for about a fifth of its pairs; the loss would push each
away from captions that describe it. Captions that fit several concepts ("animal, mammal") stay, as in any real data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..config import ConfigError
from ..tokenizer import encode
from .augment import AUGMENT_DRAWS, augment
from .pairs import Pairs


@dataclass(frozen=True)
class Batch:
    """A rank's share, b pairs.

    images  (b, 3, H, W) float32 in [-1, 1]
    tokens  (b, L) int64
    keys    names the samples of the whole batch, not of the share alone
    """

    images: Tensor
    tokens: Tensor
    keys: tuple[str, ...]


class Sampler:
    """Cuts training batches from pairs that are in memory, with all captions tokenized once. An epoch takes each
    concept once, by one of its drawings and one of that drawing's captions, both drawn at random.

    Raises ConfigError where a batch would need more concepts than there are.
    """

    def __init__(self, pairs: Pairs, tokenizer: Tokenizer, context_length: int, batch_size: int, seed: int) -> None:
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        concepts = pairs.concepts.numpy()
        self._drawings = np.argsort(concepts, kind="stable")  # the drawings of a concept lie side by side
        _, self._first_drawing, self._drawing_counts = np.unique(
            concepts[self._drawings], return_index=True, return_counts=True
        )
        if len(self._first_drawing) < batch_size:
            raise ConfigError(
                f"optimizer.batch_size={batch_size}; allowed: at most {len(self._first_drawing)}, the number of "
                "concepts in the training data, since a batch takes each concept once"
            )
        self._caption_counts = np.array([len(captions) for captions in pairs.captions])
        self._first_caption = np.cumsum(self._caption_counts) - self._caption_counts
        self.tokens = encode(tokenizer, [text for captions in pairs.captions for text in captions], context_length)

    def share(self, step: int, rank: int, ranks: int, device: torch.device) -> Batch:
        """Rank `rank`'s even part of the batch of `step`."""
        concepts = batch_indices(len(self._first_drawing), self.batch_size, step, self.seed)
        # Numpy's Philox is counter-based: (seed, step) is its state. 1 tells this stream from the PSD partition's.
        draws = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, 1]))
        drawings = self._drawings[_pick(self._first_drawing, self._drawing_counts, concepts, draws)]
        captions = _pick(self._first_caption, self._caption_counts, drawings, draws)
        size = self.batch_size // ranks
        local = slice(rank * size, (rank + 1) * size)
        generator = torch.Generator().manual_seed(int(draws.integers(2**62)))
        torch.rand(local.start, AUGMENT_DRAWS, generator=generator)  # past the pictures of the ranks before
        images = augment(self.pairs.images[torch.from_numpy(drawings[local])], generator)
        return Batch(
            images.to(device),
            self.tokens[torch.from_numpy(captions[local])].to(device),
            tuple(self.pairs.keys[index] for index in drawings),
        )


def batch_indices(n: int, batch: int, step: int, seed: int) -> np.ndarray:
    """(batch,) int64, batch <= n: which of n things the global batch of a step takes, a pure function of the arguments.

    Epoch permutations follow one another without a gap, and a batch may lie across two; no batch takes a thing twice.
    For n < 2 * batch each step takes the first `batch` of a permutation of its own, since two batches in a row must
    then share some.
    """
    if not 1 <= batch <= n or step < 0 or seed < 0:
        raise ValueError(f"batch={batch} must lie in [1, n={n}], and step={step} and seed={seed} must be at least 0")
    if n < 2 * batch:
        return _permutation(n, seed, step)[:batch]
    epoch, offset = divmod(step * batch, n)
    first = _epoch_order(n, batch, seed, epoch)[offset : offset + batch]
    if len(first) == batch:
        return first.copy()
    return np.concatenate([first, _epoch_order(n, batch, seed, epoch + 1)[: batch - len(first)]])


@lru_cache(maxsize=4)
def _epoch_order(n: int, batch: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64: the order of an epoch for n >= 2 * batch, such that the batch across its start repeats no sample.

    That batch takes the last samples of the epoch before and the first of this one. First samples that are among
    those last ones change places with samples from the middle, never from this epoch's own end, on which the next
    epoch relies; so an order follows from two permutations and needs no walk through the epochs before.
    """
    order = _permutation(n, seed, epoch)
    head = -epoch * n % batch  # samples of this epoch in the batch across its start
    if head:
        before = _permutation(n, seed, epoch - 1)[n - (batch - head) :]
        middle_end = n - (epoch + 1) * n % batch
        clashes = np.flatnonzero(np.isin(order[:head], before))
        free = head + np.flatnonzero(~np.isin(order[head:middle_end], before))[: len(clashes)]
        order[clashes], order[free] = order[free], order[clashes]
    order.flags.writeable = False  # it is shared through the cache
    return order


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def _pick(first: np.ndarray, counts: np.ndarray, of: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """One position at random from each of the runs `of`, which start at `first` and are `counts` long."""
    return first[of] + (draws.random(len(of)) * counts[of]).astype(np.int64)
