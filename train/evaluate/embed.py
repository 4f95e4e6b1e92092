"""Pictures and captions as unit rows, chunk by chunk, in shares over all ranks; each chunk counts as progress (see
heartbeat.tick). In fp32, without augmentation.

A chunk is embedded whole by one rank, and which records it holds does not depend on the number of ranks; so neither do
the rows, to the last bit, as long as the ranks compute with as many threads each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import heartbeat
from ..data import BadRecordError, decode
from ..options import DataOptions
from ..towers import Bundle
from ..world import World
from .sets import EvaluationSet
from .shares import in_shares

CHUNK = 256  # pictures or captions at a time


@torch.no_grad()
def embed_images(bundle: Bundle, pairs: EvaluationSet, options: DataOptions, world: World) -> tuple[Tensor, np.ndarray]:
    """The set's pictures as (k, E) unit rows on the CPU, and which records they are of, (k,) int64: those whose picture
    can be decoded."""

    def chunk(number: int) -> tuple[Tensor, list[int]]:
        images, kept = [], []
        for record in range(CHUNK * number, min(CHUNK * (number + 1), len(pairs))):
            try:
                images.append(decode(pairs.source.read(int(pairs.records[record])).image, options.max_pixels))
            except BadRecordError:  # beyond those that were looked at before (sets.DECODED)
                continue
            kept.append(record)
        rows = torch.empty(0, bundle.width)
        if images:
            rows = bundle.module(bundle.prepare(images, None).to(_device(bundle)), None)[0].cpu()
        heartbeat.tick()
        return rows, kept

    chunks = in_shares(world, math.ceil(len(pairs) / CHUNK), chunk)
    return torch.cat([rows for rows, _ in chunks]), np.array([record for _, kept in chunks for record in kept])


@torch.no_grad()
def embed_texts(bundle: Bundle, texts: Sequence[str], world: World) -> Tensor:
    """n captions → (n, E) unit rows on the CPU."""

    def chunk(number: int) -> Tensor:
        tokens = bundle.tokenize(texts[CHUNK * number : CHUNK * (number + 1)])
        rows: Tensor = bundle.module(None, tokens.to(_device(bundle)))[1].cpu()
        heartbeat.tick()
        return rows

    return torch.cat(in_shares(world, math.ceil(len(texts) / CHUNK), chunk))


def _device(bundle: Bundle) -> torch.device:
    return bundle.module.log_scale.device
