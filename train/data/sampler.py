"""The global batch of a step and a rank's share of it: functions of (seed, step) only, whatever the number of ranks.

A batch holds at most one drawing of each concept. Vendors draw the same things, and a batch of 512 taken at random from
this data has another vendor's drawing of the same concept for about a fifth of its pairs; the loss would push each away
from captions that describe it. Captions that fit several concepts ("animal, mammal") stay, as in any real data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from train.config import ConfigError
from train.data import Pairs, augment, batch_indices
from train.tokenizer import encode

AUGMENT_DRAWS = 8  # uniform numbers that train.data.augment takes for each picture, in order


@dataclass(frozen=True)
class Batch:
    """A rank's share, b pairs: images (b, 3, H, W) float32 in [-1, 1], tokens (b, L) int64. ``keys`` names the samples
    of the whole batch."""

    images: Tensor
    tokens: Tensor
    keys: tuple[str, ...]


class Sampler:
    """Cuts training batches from pairs that are in memory, with all captions tokenised once. An epoch takes each
    concept once, by one of its drawings and one of that drawing's captions, both drawn at random."""

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
        own = slice(rank * size, (rank + 1) * size)
        generator = torch.Generator().manual_seed(int(draws.integers(2**62)))
        torch.rand(own.start, AUGMENT_DRAWS, generator=generator)  # past the pictures of the ranks before
        images = augment(self.pairs.images[torch.from_numpy(drawings[own])], generator)
        return Batch(
            images.to(device),
            self.tokens[torch.from_numpy(captions[own])].to(device),
            tuple(self.pairs.keys[index] for index in drawings),
        )


def _pick(first: np.ndarray, counts: np.ndarray, of: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """One position at random from each of the runs `of`, which start at `first` and are `counts` long."""
    return first[of] + (draws.random(len(of)) * counts[of]).astype(np.int64)


def all_captions(pairs: Pairs) -> list[str]:
    """What the tokenizer is trained on: the captions of the training pairs, each once."""
    return sorted({text for captions in pairs.captions for text in captions})
