"""Two small towers, their data on every rank, and DeepSpeed as tests can start it."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from helpers.hosts import on_cpu

COUNTS = (13, 9, 2, 6)  # pairs of each rank: uneven, and hardly one a multiple of a number of micro-batches


class Towers(nn.Module):
    """Two towers that draw random numbers, and a learnable scale."""

    def __init__(self, dropout, dtype):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Dropout(dropout), nn.Linear(20, 8))
        self.text = nn.Sequential(nn.Linear(5, 20), nn.GELU(), nn.Dropout(dropout), nn.Linear(20, 8))
        self.log_scale = nn.Parameter(torch.tensor([1.5]))  # DeepSpeed takes no parameter without a dimension
        self.to(dtype)

    def forward(self, images, texts):
        return (
            F.normalize(self.image(images), dim=1),
            F.normalize(self.text(texts), dim=1),
            self.log_scale.exp().squeeze(),
        )


def make(dropout, dtype):
    torch.manual_seed(0)
    return Towers(dropout, dtype)


def data(step, rank, dtype):
    generator = torch.Generator().manual_seed(100 * step + rank)
    images, texts = (torch.randn(COUNTS[rank], width, generator=generator, dtype=torch.float64) for width in (6, 5))
    return images.to(dtype), texts.to(dtype)


def split(batch, parts):
    """As tensor_split does: sizes differ by one."""
    return list(zip(*(tensor.tensor_split(parts or 1) for tensor in batch), strict=True))


def import_deepspeed(group):
    """DeepSpeed in a rank's process, without its all-reduce through shared memory, which it would compile at its first
    start: that takes longer than these tests may."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank(group))  # as a launcher would
    on_cpu.spare_a_build()
    import deepspeed

    return deepspeed
