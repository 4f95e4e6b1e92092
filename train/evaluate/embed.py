"""Pictures and captions as unit rows, chunk by chunk; each chunk counts as progress (see heartbeat.tick). In fp32,
without augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import heartbeat
from ..data import BadRecordError, decode
from ..options import DataOptions
from ..towers import Bundle
from .sets import EvaluationSet

CHUNK = 256  # pictures or captions at a time


@torch.no_grad()
def embed_images(bundle: Bundle, pairs: EvaluationSet, options: DataOptions) -> tuple[Tensor, np.ndarray]:
    """The set's pictures as (k, E) unit rows on the CPU, and which records they are of, (k,) int64: those whose picture
    can be decoded."""
    rows, kept = [], []
    for begin in range(0, len(pairs), CHUNK):
        images = []
        for record in range(begin, min(begin + CHUNK, len(pairs))):
            try:
                images.append(decode(pairs.source.read(int(pairs.records[record])).image, options.max_pixels))
            except BadRecordError:  # beyond those that were looked at before (sets.DECODED)
                continue
            kept.append(record)
        if images:
            rows.append(bundle.module(bundle.prepare(images, None).to(_device(bundle)), None)[0].cpu())
        heartbeat.tick()
    return torch.cat(rows), np.array(kept)


@torch.no_grad()
def embed_texts(bundle: Bundle, texts: Sequence[str]) -> Tensor:
    """n captions → (n, E) unit rows on the CPU."""
    rows = []
    for begin in range(0, len(texts), CHUNK):
        rows.append(bundle.module(None, bundle.tokenize(texts[begin : begin + CHUNK]).to(_device(bundle)))[1].cpu())
        heartbeat.tick()
    return torch.cat(rows)


def _device(bundle: Bundle) -> torch.device:
    return bundle.module.log_scale.device
