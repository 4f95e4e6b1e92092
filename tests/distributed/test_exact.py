"""What check_exact says of right steps, and of steps with a defect each: on two ranks, and alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import planted
from helpers.planted import PARTS, fused, open_clips, times
from helpers.towers import data, import_deepspeed, make
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from softclip_kernels.testing import SQUARE_TARGETS, InsensitiveError, assert_exact, check_exact, dense_loss

RANKS = 2  # of the fixture `pool`
EVEN, UNEVEN = (8, 8), (13, 9)
ENCODERS = [f"{tower}.{layer}.{kind}" for tower in ("image", "text") for layer in (0, 3) for kind in ("weight", "bias")]


def share(rank, counts=EVEN, dtype=torch.float32):
    return tuple(tensor[: counts[rank]] for tensor in data(0, rank, dtype))


def bare(group, dtype=torch.float32):
    return make(0.0, dtype)


def ddp(group, dtype=torch.float32):
    return DistributedDataParallel(make(0.0, dtype), process_group=group)


def sharded(group):
    model, mesh = make(0.0, torch.float32), DeviceMesh.from_group(group, "cpu")
    for module in (model.image, model.text, model):
        fully_shard(module, mesh=mesh)
    return model


def engine(group, stage, accumulation=1):
    """Under ZeRO-3 no parameter is so small that every rank keeps it whole, as DeepSpeed else has it."""
    model = make(0.0, torch.float32)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return import_deepspeed(group).initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )[0]


def check(group, model, make_loss, counts=EVEN, **options):
    """The report, on this rank, of a loss or, with steps=True, of a step."""
    made = make_loss(group)
    way = {"step": made} if options.pop("steps", False) else {"loss": made}
    rank = dist.get_rank(group) if group else 0
    return check_exact(model(group), share(rank, counts), group=group, **way, **options)


# What is right.


def micro_batches_within(x, y, scale):
    """Of both ranks: the mean of the losses of each micro-batch of each."""
    parts = [part for own in torch.arange(sum(EVEN)).split(EVEN) for part in own.tensor_split(PARTS)]
    return torch.stack([dense_loss(x[part], y[part], scale) for part in parts]).mean()


def psd(n, m):
    return SQUARE_TARGETS["psd"](n, m)


def right(group, name):
    whole = psd(sum(UNEVEN), sum(UNEVEN))
    two_steps = {"steps": True, "micro_batches": PARTS}
    return {
        "softclip": lambda: check(group, ddp, fused),
        "uneven": lambda: check(group, ddp, fused, UNEVEN),
        "target": lambda: check(group, ddp, lambda group: fused(group, whole), UNEVEN, target=whole),
        "gather with gradient": lambda: check(group, ddp, open_clips(False, True)),
        "local loss, gather with gradient": lambda: check(group, ddp, open_clips(True, True)),
        "fully_shard": lambda: check(group, sharded, fused, UNEVEN),
        "two passes": lambda: check(group, ddp, planted.two_pass, UNEVEN, **two_steps),
        "cached": lambda: check(group, ddp, planted.cached(), UNEVEN, **two_steps),
        "another reference": lambda: check(
            group, ddp, planted.within(True, planted.local), reference=micro_batches_within, **two_steps
        ),
    }[name]()


@pytest.mark.parametrize(
    "name",
    (
        "softclip",
        "uneven",
        "target",
        "gather with gradient",
        "local loss, gather with gradient",
        "fully_shard",
        "two passes",
        "cached",
        "another reference",
    ),
)
def test_a_right_step_is_exact(pool, name):
    first, second = pool.run(right, name)
    assert first == second or str(first) == str(second)  # a loss that is not returned is NaN
    assert first.ok and first.findings == (), first
    assert [row.name for row in first.rows] == ["log_scale", *ENCODERS]
    assert max(max(row.difference, row.between) for row in first.rows) < 1e-5  # float32; measured: 5e-7
    assert torch.tensor([row.ratio for row in first.rows]).sub(1).abs().max() < 1e-5


def in_float64(group):
    rank = dist.get_rank(group)
    model, batch = ddp(group, torch.float64), share(rank, UNEVEN, torch.float64)
    return check_exact(model, batch, fused(group), group=group)


def test_float64_is_held_to_its_own_rounding(pool):
    for report in pool.run(in_float64):
        assert report.ok and report.tolerance == 1e-9, report
        assert max(row.difference for row in report.rows) < 1e-12
        assert report.loss == pytest.approx(report.exact_loss, rel=1e-12)


def under_deepspeed(group, stage):
    """A right step, one of half the size, and one without other ranks' negatives."""
    makes = (fused, times(0.5), planted.local)
    return [check(group, lambda group: engine(group, stage), make, UNEVEN) for make in makes]


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_deepspeed(pool, stage):
    for exact, halved, local in pool.run(under_deepspeed, stage):
        assert exact.ok, exact
        assert {round(row.ratio, 4) for row in halved.rows} == {0.5} and not halved.ok
        assert len(local.findings) == 1 and local.findings[0].startswith("local negatives"), local


# What is wrong.

STEPS = {"steps": True}
MICRO = {"steps": True, "micro_batches": PARTS}
DEFECTS = {
    # name: (model, what makes the loss or the step, samples, options, how the finding begins, a part of it)
    "halved": (
        ddp,
        times(0.5),
        EVEN,
        {},
        "averaged once too often: ",
        "1/2 through x, 1/2 through y, 1/2 through scale",
    ),
    "doubled": (ddp, times(2.0), EVEN, {}, "summed over ranks, not averaged: ", "2 through scale"),
    "1 % too much": (ddp, times(1.01), EVEN, {}, "wrong size: ", "1.0100 through x"),
    "0.1 % too much": (ddp, times(1.001), EVEN, {}, "a little off in size", ""),
    "open_clip": (
        ddp,
        open_clips(False, False),
        EVEN,
        {},
        "averaged once too often, but for the scale",
        "1/2 through y",
    ),
    "open_clip, local loss": (ddp, open_clips(True, False), EVEN, {}, "gathered without gradient", "--local-loss"),
    "own rows back": (
        *(ddp, open_clips(True, False, True), EVEN, {}),
        *("gathered without gradient: each rank takes the loss of its own rows", "from that loss alone"),
    ),
    "local": (ddp, planted.local, EVEN, {}, "local negatives", "Way out: gather"),
    "local, uneven": (ddp, planted.local, UNEVEN, {}, "local negatives", ""),
    "local, fully_shard": (sharded, planted.local, UNEVEN, {}, "local negatives", ""),
    "local, doubled": (ddp, times(2.0, planted.local), EVEN, {}, "local negatives", "moreover summed over ranks"),
    "labels": (ddp, open_clips(True, True, shift=False), EVEN, {}, "labels without the rank's offset", ""),
    "detached": (ddp, planted.detached, EVEN, {}, "nothing learns through y (detached", "1 through x, 0 through y"),
    "nothing": (ddp, times(0.0), EVEN, {}, "nothing learns through x and y and scale", ""),
    "tail": (ddp, planted.tail_dropped, UNEVEN, {}, "the uneven tail is dropped", "keeps 9 of its 13, 9 samples"),
    "alike": (ddp, planted.alike, UNEVEN, {}, "every rank's mean counts alike", ""),
    "scale thrice": (
        ddp,
        planted.cached(PARTS),
        EVEN,
        MICRO,
        "the scale is counted 3 times",
        "1 through x, 1 through y",
    ),
    "scale thrice, unsaid": (
        ddp,
        planted.cached(PARTS),
        EVEN,
        STEPS,
        "the scale is counted 3 times",
        "3 through scale",
    ),
    "all thrice": (ddp, planted.repeated, EVEN, MICRO, "counted 3 times: accumulated", "3 through x"),
    "all thrice, unsaid": (ddp, planted.repeated, EVEN, STEPS, "counted 3 times: accumulated", "3 through x"),
    "a third": (
        ddp,
        times(1 / 3),
        EVEN,
        {"micro_batches": PARTS},
        "1/3 of it: divided by micro-batches",
        "1/3 through y",
    ),
    "thrice and scale": (
        *(ddp, planted.cached(PARTS, 3.0), EVEN, MICRO),
        *("counted 3 times: accumulated", "and the scale is counted 3 times where the encoders are counted once"),
    ),
    "within": (ddp, planted.within(True), UNEVEN, MICRO, "each micro-batch is contrasted within itself", "TwoPass"),
    "within, thrice": (ddp, planted.within(False), EVEN, MICRO, "each micro-batch is contrasted within", "3 through x"),
    "within, local": (ddp, planted.within(True, planted.local), EVEN, MICRO, "each micro-batch of each rank is", ""),
    "leftover": (ddp, planted.leftover_dropped, EVEN, MICRO, "the tail is dropped that 3 equal micro-batches", ""),
    "loss scale": (ddp, planted.loss_scale_kept, EVEN, STEPS, "still multiplied by a loss scale", "65536 through x"),
}


def diagnose(group, name):
    model, make_loss, counts, options, *_ = DEFECTS[name]
    return check(group, model, make_loss, counts, **options)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_and_named(pool, name):
    *_, begin, part = DEFECTS[name]
    for report in pool.run(diagnose, name):
        assert not report.ok and not all(row.ok for row in report.rows)
        assert len(report.findings) == 1, report
        assert report.findings[0].startswith(begin) and part in report.findings[0], report


def test_the_rows_tell_the_scale_from_the_encoders(pool):
    for report in pool.run(diagnose, "open_clip"):
        ratios = {row.name: round(row.ratio, 4) for row in report.rows}
        assert ratios == {"log_scale": 1.0} | dict.fromkeys(ENCODERS, 0.5)
        assert [row.name for row in report.rows if row.ok] == ["log_scale"]
        (line,) = [line for line in str(report).splitlines() if "image.0.weight" in line]
        assert line.split()[0] == "0.5000" and line.endswith("and 5 more  <- averaged once too often")


UNREDUCED = {
    "past the wrapper": (ddp, planted.past_the_wrapper),
    "no wrapper": (bare, planted.cached()),  # two passes, each rank's gradient left as it is
    "no_sync": (ddp, planted.never_synchronised),
}


def unreduced(group, name):
    return check(group, *UNREDUCED[name], **MICRO)


@pytest.mark.parametrize("name", UNREDUCED)
def test_gradients_that_are_not_reduced_are_found(pool, name):
    for report in pool.run(unreduced, name):
        apart, mean = report.findings
        assert apart.startswith("not reduced: ranks keep gradients of their own"), report
        assert mean == "the mean over ranks is exact: nothing else is wrong"
        assert all(row.between > 0.1 and row.difference < 1e-5 and not row.ok for row in report.rows)
        assert "<- not reduced" in str(report)


def turned(gradient):
    """By 1 % of its length, to what stands upright on it."""
    other = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    other -= (other * gradient).sum() / gradient.square().sum() * gradient
    return gradient + 0.01 * other * gradient.norm() / other.norm()


DISTURBANCES = {"more": lambda gradient: 1.01 * gradient, "turned": turned}


def disturbed(group, name, disturbance):
    """With another gradient of one parameter, on every rank."""

    def make_step(group):
        def step(model, batch):
            fused(group)(*model(*batch)).backward()
            parameter = dict(model.module.named_parameters())[name]
            parameter.grad = DISTURBANCES[disturbance](parameter.grad)

        return step

    return check(group, ddp, make_step, **STEPS)


@pytest.mark.parametrize(
    ("name", "disturbance"),
    (("log_scale", "more"), ("image.0.weight", "more"), ("image.0.weight", "turned"), ("text.3.bias", "turned")),
)
def test_one_gradient_off_by_one_percent_is_refused(pool, name, disturbance):
    for report in pool.run(disturbed, name, disturbance):
        assert [row.name for row in report.rows if not row.ok] == [name]
        (row,) = [row for row in report.rows if row.name == name]
        assert row.difference == pytest.approx(0.01, rel=1e-2)
        expected = (1.01, 0.0) if disturbance == "more" else (1.0, 0.01)
        assert (row.ratio, row.error) == pytest.approx(expected, abs=1e-4)
        assert len(report.findings) == 1 and f"  {name}  <- " in str(report)


def at_tolerance(group, tolerance):
    return check(group, ddp, times(1.01), tolerance=tolerance)


def test_the_tolerance_is_the_difference_that_passes(pool):
    assert [report.ok for report in pool.run(at_tolerance, 0.0101)] == [True, True]
    assert [report.ok for report in pool.run(at_tolerance, 0.0099)] == [False, False]


def drifted(group):
    model = ddp(group)
    with torch.no_grad():
        model.module.text[0].bias += 0.01 * dist.get_rank(group)
    return check(group, lambda group: model, fused)


def test_ranks_that_begin_apart_are_found(pool):
    for report in pool.run(drifted):
        assert not report.ok
        assert report.findings[0].startswith("ranks begin with different parameters, text.0.bias: ")


def missing(group):
    return check(group, bare, planted.texts_on_the_first_rank, **STEPS)


def test_a_gradient_that_one_rank_lacks_is_found(pool):
    for report in pool.run(missing):
        assert {row.name: row.missing for row in report.rows if row.missing} == {
            name: (1,) for name in ENCODERS if name.startswith("text")
        }
        (finding,) = [each for each in report.findings if each.startswith("no gradient for")]
        assert finding.startswith("no gradient for text.0.weight, text.0.bias, text.3.weight and 1 more on rank 1: ")


def test_gradients_that_are_not_finite_are_found():
    def step(model, batch):
        dense_loss(*model(*batch)).backward()
        model.text[0].bias.grad[3] = torch.nan

    report = check_exact(make(0.0, torch.float32), share(0), step=step)
    assert report.findings == ("gradients that are NaN or infinite: of text.0.bias, where the exact ones are finite",)
    assert [row.name for row in report.rows if not row.ok] == ["text.0.bias"]


def test_a_parameter_without_effect_is_no_finding():
    """It has no gradient in either, or one of rounding only: a bias before a normalisation."""
    model = make(0.0, torch.float32)
    model.unused = nn.Parameter(torch.ones(3))
    model.image[0] = nn.Sequential(model.image[0], nn.LayerNorm(20))
    model.image[0][0].weight.data.mul_(0).add_(torch.randn(1, 6))  # every unit the same: LayerNorm takes it out
    report = check_exact(model, share(0), dense_loss)
    rows = {row.name: row for row in report.rows}
    assert report.ok and math.isnan(rows["unused"].ratio) and rows["unused"].missing == (), report
    assert "   -" in str(report) and "unused" in str(report)


def refused_on_one(group):
    """What this rank raises where rank 1 is refused, and where its reference raises."""
    rank = dist.get_rank(group)

    def reference(x, y, scale):
        if rank == 1:
            raise KeyError("caption")
        return dense_loss(x, y, scale)

    raised = []
    for options in ({"tolerance": 2.0} if rank == 1 else {}, {"reference": reference}):
        with pytest.raises((KeyError, RuntimeError, ValueError)) as caught:
            check(group, ddp, fused, **options)
        raised.append(str(caught.value))
    return raised


def test_what_is_refused_on_one_rank_is_refused_on_all(pool):
    (told, told_too), (refused, raised) = pool.run(refused_on_one)
    assert refused.startswith("tolerance=2.0 must lie in") and "rank 1 failed with ValueError: tolerance=2.0" in told
    assert raised == "'caption'" and "the exact gradient: rank 1 failed with KeyError: 'caption'" in told_too


def asserted(group):
    passed = assert_exact(ddp(group), share(dist.get_rank(group)), fused(group), group=group).ok
    with pytest.raises(AssertionError) as raised:
        assert_exact(ddp(group), share(dist.get_rank(group)), planted.local(group), group=group)
    return passed, str(raised.value)


def test_assert_exact_raises_with_the_table_on_every_rank(pool):
    (first, table), (second, same) = pool.run(asserted)
    assert first and second and table == same
    lines = table.splitlines()
    assert lines[0] == "NOT exact: 9 of 9 gradients are wrong (2 ranks of 8 samples, tolerance 0.0001)"
    assert lines[1].startswith("- local negatives")
    assert lines[3].startswith("loss 2.97") and "exact 3.81" in lines[3]
    assert lines[5].split() == ["ratio", "error", "ranks", "parameters"]
    assert lines[6].endswith("log_scale  <- wrong size")
    assert lines[7].endswith("image.0.weight, image.0.bias, image.3.weight and 5 more  <- another direction")


# Alone, without a group.


class Named(nn.Module):
    """Takes and returns dicts, as open_clip's and transformers' do; with a locked tower, a hook of its own, a weight
    that is used twice, and half of a layer's work in a parametrization."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.locked = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 8)
        self.text = nn.utils.parametrizations.weight_norm(self.text)
        self.locked.requires_grad_(False)
        self.image.register_forward_hook(lambda module, given, out: 2 * out)
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.ones(8))

    def forward(self, images, texts):
        image, text = (self.locked(tower) + self.shift for tower in (self.image(images), self.text(texts)))
        return {
            "image_features": F.normalize(image, dim=1),
            "text_features": F.normalize(text, dim=1),
            "logit_scale": self.log_scale.exp(),
        }


def clip(image_features, text_features, logit_scale):
    return dense_loss(image_features, text_features, logit_scale)


def test_dicts_locked_towers_hooks_and_parametrizations():
    batch = dict(zip(("images", "texts"), share(0), strict=True))
    report = check_exact(Named(), batch, clip)
    assert report.ok and not any("locked" in row.name for row in report.rows) and len(report.rows) == 6, report
    wrong = check_exact(Named(), batch, lambda **outputs: clip(**outputs) * outputs["logit_scale"].detach())
    assert "through output['image_features']" in wrong.findings[0]


def test_a_compiled_model():
    compiled = torch.compile(make(0.0, torch.float32), backend="eager")
    assert check_exact(compiled, share(0), dense_loss).ok
    halved = check_exact(compiled, share(0), lambda *outputs: dense_loss(*outputs) / 2)
    assert halved.findings[0].startswith("1/2 of it: divided once too often")


@pytest.mark.parametrize(
    ("make_step", "begin"),
    (
        (planted.two_pass, ""),
        (planted.cached(), ""),
        (planted.cached(PARTS), "the scale is counted 3 times"),
        (planted.repeated, "counted 3 times"),
        (planted.within(True), "each micro-batch is contrasted within itself"),
        (planted.leftover_dropped, "the tail is dropped"),
    ),
)
def test_accumulation_on_one_process(make_step, begin):
    report = check(None, bare, make_step, **MICRO)
    assert report.ok == (begin == "") and all(finding.startswith(begin) for finding in report.findings), report


def test_a_loss_of_any_other_form_has_its_own_reference():
    """And a model that takes and returns one tensor."""
    model, batch = nn.Linear(5, 3), torch.randn(7, 5, generator=torch.Generator().manual_seed(0))

    def square(out):
        return out.square().mean()

    assert check_exact(model, batch, square, reference=square).ok
    report = check_exact(model, batch, square, reference=lambda out: out.square().sum())
    assert "1/21 of it" in report.findings[0], report


def test_nothing_is_left_behind():
    model = make(0.0, torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # of an earlier step: not part of this one
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert check_exact(model, share(0), dense_loss).ok
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks == [len(module._forward_hooks) for module in model.modules()] and model.training


# What cannot be compared is refused.


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.towers = make(0.0, torch.float32)

    def forward(self, images, texts):
        return self.towers(F.dropout(images, 0.5), texts)


class Casts(nn.Linear):
    def forward(self, images):
        return super().forward(images.float())


def with_batch_norm():
    model = make(0.0, torch.float32)
    model.image[2] = nn.BatchNorm1d(20)
    return model


def steps_too(model, batch):
    dense_loss(*model(*batch)).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def towers():
    return make(0.0, torch.float32)


REFUSED = {
    "dropout": (lambda: make(0.3, torch.float32), {}, ValueError, r"image\.2 \(Dropout\) .* p=0\.3.*model\.eval\(\)"),
    "attention's dropout": (
        *(lambda: nn.MultiheadAttention(8, 2, dropout=0.1), {}),
        *(ValueError, r"\(MultiheadAttention\) is in training mode with dropout=0\.1"),
    ),
    "functional dropout": (Draws, {}, ValueError, "returns other outputs .* switch off what draws random numbers"),
    "casts": (
        lambda: Casts(6, 4),
        {"batch": share(0)[0]},
        RuntimeError,
        "the model in float64 failed: .* not to float32",
    ),
    "batch norm": (with_batch_norm, {}, ValueError, r"image\.2 \(BatchNorm1d\) is in training mode: its statistics"),
    "an optimizer's step": (towers, {"loss": None, "step": steps_too}, ValueError, "the step changed parameters"),
    "no loss": (towers, {"loss": None}, ValueError, "either loss or step=, not neither"),
    "two": (towers, {"step": steps_too}, ValueError, "either loss or step=, not both"),
    "two references": (towers, {"target": psd(8, 8), "reference": dense_loss}, ValueError, "target= or reference="),
    "no target": (towers, {"target": "psd"}, TypeError, "target"),
    "no micro-batches": (towers, {"micro_batches": 0}, ValueError, "micro_batches=0; at least 1"),
    "tolerance": (towers, {"tolerance": 1.5}, ValueError, r"tolerance=1\.5 must lie in \(0, 1\)"),
    "nothing learns": (lambda: towers().requires_grad_(False), {}, ValueError, "no parameter .* requires a gradient"),
    "no scalar": (towers, {"loss": lambda x, y, scale: x}, TypeError, "the loss must return a tensor of one element"),
    "no scalar reference": (towers, {"reference": lambda x, y, scale: x}, TypeError, "reference must return a scalar"),
    "other outputs": (lambda: nn.Bilinear(6, 5, 4), {}, TypeError, r"returned a tensor of shape \(8, 4\).*reference="),
    "no samples": (towers, {"batch": (3.0, 2)}, ValueError, r"the batches .* hold \[0\] tensors of samples"),
    "NaN": (towers, {"batch": (torch.full((8, 6), torch.nan), torch.ones(8, 5))}, ValueError, "exact loss is nan"),
    "one pair": (towers, {"batch": share(0, (1, 1))}, InsensitiveError, "exact gradient is 0 everywhere"),
    "too coarse": (
        *(towers, {"micro_batches": 2, "tolerance": 0.9}),
        *(InsensitiveError, "a tolerance of 0.9 this would pass: .* contested"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused(name):
    model, options, error, words = REFUSED[name]
    arguments = {"batch": share(0), "loss": dense_loss} | options
    with pytest.raises(error, match=words):
        check_exact(model(), **arguments)


def test_dropout_that_is_off_is_none():
    model = make(0.3, torch.float32).eval()
    assert check_exact(model, share(0), dense_loss).ok and not model.training


def accumulating_engine(group):
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4; give step="):
        check(group, lambda group: engine(group, 1, 4), fused)


def test_an_engine_that_accumulates_needs_a_step(pool):
    pool.run(accumulating_engine)
