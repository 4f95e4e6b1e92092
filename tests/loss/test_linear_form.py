"""A loss as a linear form of its statistics: what it makes of a gradient is what autograd makes of it, and which way
the kernels are called changes nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.backends import BACKENDS
from torch.utils._python_dispatch import TorchDispatchMode

from softclip_kernels import Hard, Mix, Ratio, SelfTeacher, Target, Weighted, autograd, softclip_loss
from softclip_kernels.linear_form import LinearForm, LinearForms, times
from softclip_kernels.stats import SoftmaxStatistics
from softclip_kernels.testing import ALL_TARGETS, Result, operands

L = 7


def vector(seed):
    return torch.rand(L, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1


def forms():
    """With and without each part, as numbers and as vectors."""
    seen = torch.arange(L) % 3 > 0
    for mass, dot, mean, weight in itertools.product((1.0, 0.3, vector(1)), repeat=4):
        for dots, means in (((), ()), ((dot,), ()), ((), (mean,)), ((dot, 0.7), (mean, dot))):
            yield LinearForm(mass, dots, means, weight, None)
            yield LinearForm(mass * seen.double(), dots, means, weight, seen)


def test_the_adjoint_is_autograds():
    count = 0
    for form in forms():
        packed = torch.stack([vector(10 + k) for k in range(1 + 2 * len(form.means))]).requires_grad_()
        dots = [vector(20 + k).requires_grad_() for k in range(len(form.dots))]
        losses = form.losses(SoftmaxStatistics(packed), dots)
        of_packed, *of_dots = torch.autograd.grad(losses.sum() * 0.4, (packed, *dots))
        own, own_dots = form.adjoint(0.4)
        for got, expected in zip(own, of_packed[0::2], strict=True):
            torch.testing.assert_close(times(got, torch.ones(L, dtype=torch.float64)), expected)
        for got, expected in zip(own_dots, of_dots, strict=True):
            torch.testing.assert_close(times(got, -torch.ones(L, dtype=torch.float64)), expected)
        count += 1
    assert count == 3**4 * 8


def test_forms_are_made_again_of_their_tensors():
    for form in forms():
        for both in (LinearForms(form, None), LinearForms(None, form), LinearForms(form, form)):
            tensors, restored = both.kept()
            assert all(isinstance(each, torch.Tensor) for each in tensors)
            doubled = restored([each if each.dtype == torch.bool else 2 * each for each in tensors])
            for old, new in zip(both, doubled, strict=True):
                assert (old is None) == (new is None)
                if old is None or new is None:
                    continue
                for name in ("mass", "weight"):
                    one, other = getattr(old, name), getattr(new, name)
                    assert other == one if isinstance(one, float) else torch.equal(other, 2 * one)
                assert len(old.dots) == len(new.dots) and len(old.means) == len(new.means)


# Coefficients that are numbers, vectors, or a tensor that is one number; positives that share columns; segments; masses
# that depend on the statistics.
WAYS = ("hard", "labels", "psd", "psd_several_block", "teacher_potentials", "weighted")


def target_of(name, n):
    if name in WAYS:
        return ALL_TARGETS[name](n, n)
    return Mix(Hard(), SelfTeacher(swap="paired"), torch.tensor(0.3))


class Watching(TorchDispatchMode):
    """Sees PyTorch's operators, and does nothing."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ("both", "rows", "columns"))
@pytest.mark.parametrize("name", (*WAYS, "one_alpha"))
def test_every_way_to_the_kernels_gives_the_same(name, direction, backend):
    """Directly; through the operators, where something watches; and as losses that PyTorch reduces, whose graph is
    made of many nodes."""
    n, dtype = 33, torch.float32 if backend == "cpu" else torch.float64
    x, y, scale = operands(n, n, 12, dtype=dtype)
    target = target_of(name, n)

    def loss(*leaves):
        return softclip_loss(*leaves, target, direction=direction, backend=backend)

    def in_parts(*leaves):
        losses = softclip_loss(*leaves, target, direction=direction, backend=backend, reduction="none")
        half = 0.5 if direction == "both" else 1.0
        return sum(half * each.sum() / n for each in losses)

    direct = Result.of(loss, x, y, scale)
    with Watching() as watching:
        watched = Result.of(loss, x, y, scale)
    assert {"softclip.forward.default", "softclip.backward.default"} <= set(watching.seen)
    others = [Result.of(in_parts, x, y, scale)]
    if backend == "cpu":  # its own operation sums and multiplies in double precision
        others.append(watched)
    else:
        assert not watched.differing(direct)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for field, other in itertools.product(("loss", "dx", "dy", "dscale"), others):
        one, same = getattr(direct, field), getattr(other, field)
        torch.testing.assert_close(one, same, rtol=tolerance, atol=tolerance * float(one.abs().max()))


class Lopsided(Target):
    """Hard() with the columns' entries halved."""

    def lower(self, context):
        return Hard().lower(context).scaled(1.0, 0.5)


UNLIKE = {
    "positives": Lopsided(),
    "teachers": Mix(SelfTeacher(), SelfTeacher(Ratio(2.0)), (0.2, 0.7)),
    "weights": Weighted(Hard(), (torch.full((9,), 2.0), torch.full((9,), 3.0))),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_directions_that_are_not_alike_have_a_form_each(name):
    x, y, scale = operands(9, 9, 4, dtype=torch.float64)
    both, rows, columns = (
        Result.of_loss(x, y, scale, UNLIKE[name], direction=direction) for direction in ("both", "rows", "columns")
    )
    for field in ("loss", "dx", "dy", "dscale"):
        mean = (getattr(rows, field) + getattr(columns, field)) / 2
        torch.testing.assert_close(getattr(both, field), mean, rtol=1e-12, atol=1e-12)


def test_a_loss_that_nobody_differentiates_keeps_its_gradients_away():
    """The ranks beside the loss have none."""
    x, y, scale = (leaf.requires_grad_() for leaf in operands(9, 9, 4, dtype=torch.float64))
    loss = softclip_loss(x, y, scale)
    assert type(loss.grad_fn).__name__ == f"{autograd.LocalLossFunction.__name__}Backward"
    assert torch.autograd.grad(loss * 0, (x, y, scale))[0].abs().max() == 0
