"""Images and captions as unit rows, chunk by chunk; each chunk counts as progress (see heartbeat.tick)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .. import heartbeat
from ..data import composite
from ..model import Clip
from ..tokenizer import encode

CHUNK = 256  # images or captions at a time


@torch.no_grad()
def embed_images(model: Clip, images: Tensor) -> Tensor:
    """(n, 4, H, W) uint8 RGBA → (n, E) unit rows."""
    return torch.cat([model(composite(chunk, None), None)[0] for chunk in _watched(images.split(CHUNK))])


@torch.no_grad()
def embed_captions(model: Clip, tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    """n captions → (n, E) unit rows."""
    tokens = encode(tokenizer, captions, model.text.positions.shape[0])
    return torch.cat([model(None, chunk)[1] for chunk in _watched(tokens.split(CHUNK))])


def _watched(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    for chunk in chunks:
        heartbeat.tick()
        yield chunk
