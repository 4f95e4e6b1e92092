"""How pictures reach the model: on a background, and moved a little in training."""

from __future__ import annotations

import pytest
import torch

from train.towers.small.augment import AUGMENT_DRAWS, augment, composite

SIZE = 16


def test_pictures_are_laid_on_white_or_on_a_color() -> None:
    images = torch.zeros(3, 4, 2, 2, dtype=torch.uint8)
    images[:, 0] = 255  # red: clear, half clear, solid
    images[:, 3] = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None]
    white = composite(images, None)
    assert white.shape == (3, 3, 2, 2)
    assert white.dtype == torch.float32
    expected = torch.tensor([[1, 1, 1], [1, 0.6, 0.6], [1, -1, -1]])
    torch.testing.assert_close(white[..., 0, 0], expected)
    blue = composite(images, torch.tensor([[0.0, 0.0, 1.0]]).expand(3, 3))
    torch.testing.assert_close(blue[..., 1, 1], torch.tensor([[-1, -1, 1], [-0.6, -1, 0.6], [1, -1, -1]]))
    with pytest.raises(ValueError, match=r"\(3, 3\) or None is allowed"):
        composite(images, torch.zeros(3))
    with pytest.raises(ValueError, match="uint8 of"):
        composite(images.float(), None)


def test_pictures_are_moved_and_never_mirrored() -> None:
    images = torch.zeros(64, 4, SIZE, SIZE, dtype=torch.uint8)
    images[:, 1, :, : SIZE // 2] = 255  # left half solid green, right half clear
    images[:, 3, :, : SIZE // 2] = 255
    draws = torch.rand(64, AUGMENT_DRAWS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out = augment(images, draws)
    assert out.shape == (64, 3, SIZE, SIZE)
    assert out.dtype == torch.float32
    assert out.abs().amax() <= 1 + 1e-6
    assert torch.equal(out[5:9], augment(images[5:9], draws[5:9])), "each by its own numbers"
    assert not torch.equal(out, augment(images, draws.flip(1)))
    middle = out[:, :, SIZE // 2]
    torch.testing.assert_close(middle[:, :, 4], torch.tensor([-1.0, 1.0, -1.0]).expand(64, 3))  # never mirrored
    right = middle[:, :, SIZE - 2]  # the background
    white = (right > 0.999).all(1)
    assert 16 < int(white.sum()) < 48
    assert len(torch.unique(right[~white], dim=0)) > 10
    assert len({tuple(row) for row in (out[white][:, 0, SIZE // 2] > 0).tolist()}) > 2, "edges must move"
