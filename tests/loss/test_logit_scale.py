"""NaN, infinity, zero and negative values as a scale, at every entry point: a tensor that is not finite comes back as a
non-finite loss, as a diverged run's does; zero and less, and numbers that are not finite, are refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.backends import BACKENDS

from softclip_kernels import (
    Hard,
    Mix,
    ProgressiveSelfDistillation,
    SelfTeacher,
    SoftClipLoss,
    Teacher,
    TwoPass,
    schedules,
    softclip_loss,
    softclip_loss_with_ranks,
)
from softclip_kernels.testing import unit_rows

X, Y = (unit_rows(65, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
SCALE = torch.tensor(10.0)
NOT_FINITE, NOT_POSITIVE = (math.nan, math.inf, -math.inf), (0.0, -1.0)


def of_two_passes(scale):
    """A model whose scale it is, two micro-batches, all the way to the gradients."""
    model = torch.nn.Linear(8, 8)

    def encode(x, y):
        return model(x), y, scale

    passes = TwoPass(encode, list(zip(X.split(40), Y.split(40), strict=True)))
    loss = softclip_loss(*passes.outputs)
    passes.backward(loss)
    assert not model.weight.grad.isfinite().any()
    return loss


# Every way for a scale to come in.
ENTRIES = {
    "softclip_loss": lambda scale: softclip_loss(X, Y, scale),
    "softclip_loss_with_ranks": lambda scale: softclip_loss_with_ranks(X, Y, scale)[0],
    "module": lambda scale: SoftClipLoss()(X, Y, scale),
    "two passes": of_two_passes,
}
TEACHERS = {
    "a teacher's": lambda scale: Teacher(X, Y, scale),
    "a self teacher's": SelfTeacher,
    "psd's": lambda scale: ProgressiveSelfDistillation(schedules.Constant(0.5), teacher_scale=scale).at(3, len(X)),
}
ENTRIES |= {name: lambda scale, make=make: softclip_loss(X, Y, SCALE, make(scale)) for name, make in TEACHERS.items()}


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_tensor_that_is_not_finite_is_a_loss_that_is_not(entry, value):
    assert not ENTRIES[entry](torch.tensor(value)).isfinite()


@pytest.mark.parametrize("value", (*NOT_POSITIVE, -math.inf))
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_tensor_that_is_not_positive_is_refused(entry, value):
    with pytest.raises(ValueError, match=rf"scale is {value}; it must be positive: pass the exponential"):
        ENTRIES[entry](torch.tensor(value))


NUMBERS = ("softclip_loss", "softclip_loss_with_ranks", "module")  # entries that take a number


@pytest.mark.parametrize("value", (*NOT_FINITE, *NOT_POSITIVE))
@pytest.mark.parametrize("entry", NUMBERS)
def test_a_number_that_is_not_finite_or_not_positive_is_refused(entry, value):
    with pytest.raises(ValueError, match=f"logit_scale={value} must lie in"):
        ENTRIES[entry](value)


@pytest.mark.parametrize("entry", NUMBERS)
def test_a_number_is_a_scale_that_does_not_learn(entry):
    assert torch.equal(ENTRIES[entry](10.0), ENTRIES[entry](SCALE))


def test_a_number_is_as_exact_as_the_loss():
    x, y = X.double(), Y.double()
    assert torch.equal(softclip_loss(x, y, 10 / 3), softclip_loss(x, y, torch.tensor(10 / 3, dtype=torch.float64)))


@pytest.mark.parametrize("value", (*NOT_FINITE, *NOT_POSITIVE))
@pytest.mark.parametrize("entry", TEACHERS)
def test_a_teachers_number_must_be_positive_and_finite(entry, value):
    with pytest.raises(ValueError, match=rf"scale={value} must lie in \[1\.\d+e-38, 3\.\d+e\+38\]"):
        TEACHERS[entry](value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_every_backend_says_so_in_the_loss_the_gradients_and_the_ranks(backend, value):
    """The step is skipped for its loss; no gradient looks usable, and no rank looks good."""
    for target in (Hard(), Mix(Hard(), SelfTeacher(swap="paired"), 0.5), Hard(groups=(torch.arange(65),) * 2)):
        leaves = [one.clone().requires_grad_() for one in (X, Y, torch.tensor(value))]
        loss = softclip_loss(*leaves, target, backend=backend)
        assert not loss.isfinite()
        assert not any(gradient.isfinite().any() for gradient in torch.autograd.grad(loss, leaves))
    for operands in ((X, Y, torch.tensor(value)), (X * value, Y, SCALE)):
        _, ranks = softclip_loss_with_ranks(*operands, backend=backend)
        assert (ranks.rows == 65).all() and (ranks.columns == 65).all()
        assert ranks.recall(64) == (0.0, 0.0)
