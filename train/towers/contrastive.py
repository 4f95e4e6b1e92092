"""Two towers as the trainer sees them: images and tokens → unit rows and the logit scale."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_LOG_SCALE = math.log(100.0)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Contrastive(nn.Module):
    """The base of all towers. A kind of towers gives `encode_images`, `encode_texts` and `log_scale`.

    precision  what the towers are autocast to: bf16, fp16, or fp32 for none. Parameters are fp32
    log_scale  the logarithm of the logit scale, (1,); step.clamp_log_scale keeps it at or below MAX_LOG_SCALE
    locked     0 if no trained parameter stands between the images and their rows, 1 if none does between the tokens
               and theirs; as TwoPass takes it
    """

    precision: str = "fp32"
    log_scale: nn.Parameter  # shape (1,); what the library's model had for one is moved here
    locked: tuple[int, ...] = ()

    def encode_images(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) float32 → (b, E), of any length."""
        raise NotImplementedError

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(b, L) int64 → (b, E), of any length."""
        raise NotImplementedError

    def library_state(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """This module's state_dict under the names by which the library that owns the towers loads it."""
        return weights

    def compile_towers(self) -> None:
        """By torch.compile, each; names in the state_dict stay."""
        for name in ("encode_images", "encode_texts"):
            setattr(self, name, torch.compile(getattr(self, name)))

    def train(self, mode: bool = True) -> Contrastive:
        """What is locked stays as in an evaluation: no dropout, and batch norm by its stored statistics."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if module is not self and parameters and not any(parameter.requires_grad for parameter in parameters):
                module.train(False)
        return self

    def forward(self, images: Tensor | None, tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """images (b, 3, H, W), tokens (b, L) → x (b, E), y (b, E), scale (1,). None gives an empty embedding."""
        kind = self.log_scale.device.type
        dtype = AUTOCAST.get(self.precision)
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            x = self.log_scale.new_empty(0) if images is None else self.encode_images(images)
            y = self.log_scale.new_empty(0) if tokens is None else self.encode_texts(tokens)
        # Norms, similarities and the loss stay in fp32: they are a small part of the work and decide its precision.
        x, y = (F.normalize(rows.float(), dim=-1) if len(rows) else rows for rows in (x, y))
        return x, y, self.log_scale.float().exp()
