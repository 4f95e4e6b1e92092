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

from .config import ModelOptions
from .tokenizer import PAD_ID

MAX_LOG_SCALE = math.log(100.0)
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
        maps = self.stages(images)
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

    def __init__(self, options: ModelOptions, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, options.text_width)
        self.positions = nn.Parameter(torch.empty(options.context_length, options.text_width))
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
            x = block(x, visible[:, None, None, :])
        weights = visible.to(x.dtype).unsqueeze(2)
        pooled = (self.norm(x) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return cast(Tensor, self.project(pooled))


class Clip(nn.Module):
    """Images and captions → unit embeddings in fp32 and the logit scale.

    The scale is kept as its logarithm; step.clamp_log_scale keeps that at or below MAX_LOG_SCALE.
    """

    def __init__(self, options: ModelOptions, vocab_size: int, precision: str = "fp32") -> None:
        super().__init__()
        self.image = ImageTower(options.image_widths, options.embed_dim)
        self.text = TextTower(options, vocab_size)
        self.log_scale = nn.Parameter(torch.tensor([math.log(options.initial_scale)]))
        self.autocast = precision == "bf16"

    def forward(self, images: Tensor | None, tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """images (b, 3, H, W), tokens (b, L) → x (b, E), y (b, E), scale (1,). None gives an empty embedding."""
        with torch.autocast(self.log_scale.device.type, torch.bfloat16, enabled=self.autocast):
            x = self.log_scale.new_empty(0) if images is None else self.image(images)
            y = self.log_scale.new_empty(0) if tokens is None else self.text(tokens)
        # Norms, similarities and the loss stay in fp32: they are a small part of the work and decide its precision.
        x, y = (F.normalize(rows.float(), dim=-1) if len(rows) else rows for rows in (x, y))
        return x, y, self.log_scale.float().exp()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Weight decay for matrices and kernels only: not for biases, norms or the logit scale."""
        decayed = [p for p in self.parameters() if p.dim() > 1]
        plain = [p for p in self.parameters() if p.dim() <= 1]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
