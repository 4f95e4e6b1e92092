"""Two small towers and a logit scale.

Nothing here looks across the batch (no BatchNorm): the loss of a batch must not depend on how it is cut into ranks.
Shapes: b batch, L context_length, E embed_dim.
"""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...options import ModelOptions
from ..contrastive import Contrastive
from .tokenizer import PAD_ID

NORM_GROUPS = 8
GRID = 6  # side of the last maps: 48 pixels after three stages; other sizes are averaged down or repeated up to it


class ConvBlock(nn.Module):
    """A residual pair of 3×3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(self.norm(x)))))


class ImageTower(nn.Module):
    """(b, 3, H, W) in [-1, 1] → (b, E), not normalized.

    Each stage halves the resolution; all but the first, whose maps are the largest, have a residual block. The last
    maps are not averaged over space: what is where tells one drawing from another.
    """

    checkpointing = False

    def __init__(self, widths: tuple[int, ...], embed_dim: int) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, stride=2, padding=1)]
        for before, width in itertools.pairwise(widths):
            stages += [
                nn.GroupNorm(NORM_GROUPS, before),
                nn.Conv2d(before, width, 3, stride=2, padding=1),
                ConvBlock(width),
            ]
        self.stages = nn.Sequential(*stages)
        features = widths[-1] * GRID * GRID
        self.norm = nn.LayerNorm(features)
        self.project = nn.Linear(features, embed_dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = images
        for stage in self.stages:
            maps = checkpoint(stage, maps, use_reentrant=False) if self.checkpointing else stage(maps)
        if maps.shape[2:] != (GRID, GRID):
            maps = F.adaptive_avg_pool2d(maps, GRID)
        return cast(Tensor, self.project(self.norm(maps.flatten(1))))


class TextBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.hidden_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x (b, L, width); visible (b, 1, 1, L) bool, False on padding."""
        b, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, length, width))
        return cast(Tensor, x + self.down(F.gelu(self.up(self.hidden_norm(x)))))


class TextTower(nn.Module):
    """(b, L) token ids → (b, E), not normalized: the mean over tokens that are not padding."""

    checkpointing = False

    def __init__(self, options: ModelOptions, context_length: int, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, options.text_width)
        self.positions = nn.Parameter(torch.empty(context_length, options.text_width))
        width, heads = options.text_width, options.text_heads
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(options.text_layers))
        self.norm = nn.LayerNorm(options.text_width)
        self.project = nn.Linear(options.text_width, options.embed_dim, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        visible = tokens != PAD_ID
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            arguments = x, visible[:, None, None, :]
            x = checkpoint(block, *arguments, use_reentrant=False) if self.checkpointing else block(*arguments)
        weights = visible.to(x.dtype).unsqueeze(2)
        pooled = (self.norm(x) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return cast(Tensor, self.project(pooled))


class Small(Contrastive):
    """An image tower of convolutions beside a text transformer, from `options`' widths and layers."""

    def __init__(self, options: ModelOptions, context_length: int, vocab_size: int, scale: float) -> None:
        super().__init__()
        self.image = ImageTower(options.image_widths, options.embed_dim)
        self.text = TextTower(options, context_length, vocab_size)
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))

    def encode_images(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.image(images))

    def encode_texts(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.text(tokens))
