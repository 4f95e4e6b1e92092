"""What a soft target does with a wrong caption, in the geometry of docs/targets.md: embeddings are concepts with noise,
and 30 % of the captions are of another concept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softclip_kernels import Hard, Mix, Ratio, SelfTeacher, Target, Teacher, softclip_loss

PAIRS, CONCEPTS, WIDTH, SCALE, NOISE, WRONG, DRAWS = 512, 200, 128, 14.3, 0.9, 0.3, 5


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Concepts (K, D), the concept of each image and of each caption (N,), the rows of both (N, D), and those of a
    teacher with half the noise."""
    random = torch.Generator().manual_seed(seed)

    def noise(count: int) -> Tensor:
        return F.normalize(torch.randn(count, WIDTH, generator=random, dtype=torch.float64), dim=1)

    def rows(of: Tensor, share: float) -> Tensor:
        return F.normalize(concepts[of] + share * noise(PAIRS), dim=1)

    concepts = noise(CONCEPTS)
    image = torch.randint(CONCEPTS, (PAIRS,), generator=random)
    other = torch.randint(CONCEPTS, (PAIRS,), generator=random)
    caption = torch.where(torch.rand(PAIRS, generator=random) < WRONG, other, image)
    student, teacher = ((rows(image, share), rows(caption, share)) for share in (NOISE, NOISE / 2))
    return concepts, image, caption, *student, teacher


def pulls(name: str) -> tuple[float, float, float]:
    """How far a step down the image→text loss moves an image towards a concept: with a wrong caption, towards the
    image's own and towards the caption's; with a right one, towards its own."""
    found = []
    for seed in range(DRAWS):
        concepts, image, caption, x, y, teacher = drawn(seed)
        targets: dict[str, Target] = {
            "hard": Hard(),
            "smoothing": Hard(smoothing=0.1),
            "paired": SelfTeacher(swap="paired"),
            "sharp": SelfTeacher(Ratio(2.0)),
            "average": Teacher(*teacher, SCALE),
            "blend": Mix(Hard(), SelfTeacher(Ratio(2.0)), 0.5),
        }
        x = x.requires_grad_()
        scale = torch.tensor(SCALE, dtype=torch.float64)
        losses = softclip_loss(x, y, scale, targets[name], reduction="none", backend="chunked")
        (gradient,) = torch.autograd.grad(losses.rows.sum(), x)
        x = x.detach()
        down = -gradient + (gradient * x).sum(1, keepdim=True) * x  # on the sphere

        def towards(of: Tensor, x: Tensor = x, concepts: Tensor = concepts, down: Tensor = down) -> Tensor:
            direction = concepts[of] - (concepts[of] * x).sum(1, keepdim=True) * x
            return (down * F.normalize(direction, dim=1)).sum(1)

        wrong = caption != image
        own, captions = towards(image), towards(caption)
        found.append(torch.stack([own[wrong].mean(), captions[wrong].mean(), own[~wrong].mean()]))
    first, second, third = torch.stack(found).mean(0).tolist()
    return first, second, third


# As docs/targets.md prints them.
TABLE = {
    "hard": (-5.30, 10.53, 1.08),
    "smoothing": (-5.29, 9.48, 0.38),
    "paired": (-5.28, 5.70, -1.09),
    "sharp": (1.08, -0.01, 0.79),
    "average": (1.30, 0.01, 1.05),
    "blend": (-2.11, 5.26, 0.94),
}


@pytest.mark.parametrize("name", TABLE)
def test_where_a_target_moves_an_image_with_a_wrong_caption(name: str) -> None:
    assert pulls(name) == pytest.approx(TABLE[name], abs=0.005)
