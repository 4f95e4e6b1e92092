"""DeepSpeed in every stage, with and without offloading: what it trains, what it skips, and what it keeps in bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import engines
from helpers.engines import KINDS, config, plain_loop, start, take_step, weights
from helpers.ranks import Pool
from torch import Tensor

from train.engine import LossScale
from train.options import DataOptions

RANKS = 2
STEPS = 6
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
# For what depends little on how things are held: the rest is for make test-long.
QUICK = ("0", "1 offload", "2", "3")
MOST_KINDS = pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
BOTH_PASSES = pytest.mark.parametrize("micro_batches", (1, 3))
# Of float32: the sums of a step are in other orders, and Adam (its eps is not small here) hands that on.
TOLERANCE = 1e-5


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a parameter, of its own norm."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items())


def _train(group: Any, options: Any, lock: str = "none", scaler: Any = None) -> tuple[dict[str, Tensor], list[Any]]:
    made = engines.bundle(lock=lock, precision=options.job.precision)
    engine = start(group, options, made)
    if scaler is not None:
        engine.scaler = scaler
    results = [take_step(engine, step, options, group) for step in range(STEPS)]
    found = weights(engine)
    engine.destroy()
    return found, results


@BOTH_PASSES
@EVERY_KIND
def test_training_equals_a_plain_loop_with_the_dense_loss(pool: Pool, kind: str, micro_batches: int) -> None:
    options = config(kind, micro_batches=micro_batches)
    (found, results), (nothing, others) = pool.run(_train, options)
    expected, losses = plain_loop(options, STEPS)
    assert apart(found, expected) < TOLERANCE
    assert [result.loss for result in results] == pytest.approx(losses, rel=TOLERANCE)
    assert results == others and not nothing  # all ranks see the same, and the first alone gathers
    assert max(result.grad_norm for result in results) > options.optimizer.max_grad_norm, "nothing was clipped"
    assert [result.bad for result in results] == [3] * STEPS


@MOST_KINDS
def test_sgd_with_momentum_does_so_too(pool: Pool, kind: str) -> None:
    options = config(kind, name="sgd", lr=0.1)
    expected, _ = plain_loop(options, STEPS)
    assert apart(pool.run(_train, options)[0][0], expected) < TOLERANCE


@pytest.mark.parametrize("lock", ("image", "log_scale"))
@BOTH_PASSES
@MOST_KINDS
def test_what_is_locked_stays_as_it_is(pool: Pool, kind: str, micro_batches: int, lock: str) -> None:
    options = config(kind, micro_batches=micro_batches)
    found, _ = pool.run(_train, options, lock)[0]
    expected, _ = plain_loop(options, STEPS, lock=lock)
    assert apart(found, expected) < TOLERANCE
    initial = engines.bundle().module.state_dict()
    assert all(torch.equal(found[name], initial[name]) for name in found if name.startswith(lock))


@BOTH_PASSES
@MOST_KINDS
def test_a_loss_scale_changes_nothing_but_the_range(pool: Pool, kind: str, micro_batches: int) -> None:
    """In fp32, where nothing leaves the range: a power of two passes through products and sums without rounding."""
    options = config(kind, micro_batches=micro_batches)
    (found, results), _ = pool.run(_train, options, "none", LossScale(1024.0))
    expected, unscaled = pool.run(_train, options)[0]
    assert apart(found, expected) < 1e-6
    norms = [[result.grad_norm for result in each] for each in (results, unscaled)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def _fp16(group: Any, options: Any) -> dict[str, Any]:
    engine = start(group, options, engines.bundle(precision="fp16"))
    engine.scaler = LossScale(2.0**24)
    results = [take_step(engine, step, options, group) for step in range(24)]
    found = {
        "applied": [result.applied for result in results],
        "scale": engine.scaler.value,
        "norm": results[-1].grad_norm,
        "types": {parameter.dtype for parameter in engine.module.parameters()},
    }
    engine.destroy()
    return found


@BOTH_PASSES
@MOST_KINDS
def test_fp16_finds_its_loss_scale_and_keeps_its_parameters_in_fp32(pool: Pool, kind: str, micro_batches: int) -> None:
    here, there = pool.run(_fp16, config(kind, precision="fp16", micro_batches=micro_batches))
    assert here == there
    skipped = here["applied"].count(False)
    assert not here["applied"][0] and here["applied"][-1] and 6 <= skipped <= 16
    assert here["scale"] == 2.0 ** (24 - skipped)  # half of it for each step that was skipped
    assert 0.0 < here["norm"] < 1000.0, "the norm is the gradient's, not the scaled one's"
    assert here["types"] == {torch.float32}


def _with_noise(group: Any, noise: list[int]) -> list[Any]:
    from train.step import train_step

    plain, rank = config("1"), dist.get_rank()
    noisy = replace(plain, data=DataOptions(noise={"swap": 0.3}))
    engine, share = start(group, plain, engines.bundle()), engines.share(0, rank, RANKS)
    marked = replace(share, noise=torch.tensor(noise).tensor_split(RANKS)[rank])
    results = [train_step(engine, marked, 0, noisy, group), take_step(engine, 1, plain, group)]
    engine.destroy()
    return results


def test_clean_and_wrong_pairs_are_told_apart(pool: Pool) -> None:
    x, y, _ = engines.bundle().module(*engines.batch(0))
    found = (x @ y.T).argmax(1) == torch.arange(engines.PAIRS)
    noise = torch.arange(engines.PAIRS) % 3
    noise[found] = torch.arange(int(found.sum())) % 3
    (one, plain), others = pool.run(_with_noise, noise.tolist())
    assert [one, plain] == others
    expected = [found[noise == 0].double().mean().item(), found[noise > 0].double().mean().item()]
    assert [one.r1_clean, one.r1_noisy] == pytest.approx(expected) and 0 < expected[1] < expected[0]
    assert one.bad == 3 and one.r1_image_to_text == pytest.approx(found.double().mean().item())
    assert plain.r1_clean is plain.r1_noisy is None


def test_the_loss_scale_grows_where_none_overflows() -> None:
    scale = LossScale(8.0)
    for _ in range(LossScale.GROW_AFTER - 1):
        scale = scale.after(True)
    assert scale.value == 8.0
    assert scale.after(True) == LossScale(16.0)
    assert scale.after(False) == LossScale(4.0)
    assert LossScale(1.0).after(False) == LossScale(1.0)


def _skipped(group: Any, options: Any) -> dict[str, bool]:
    """What is not finite updates nothing; what follows does."""
    from train.step import train_step

    engine, rank = start(group, options, engines.bundle()), dist.get_rank()
    take_step(engine, 0, options, group)
    before = _everything(engine)
    spoilt = engines.share(1, rank, RANKS)
    if rank == 1:
        spoilt.images[0, 0, 0, 0] = torch.nan
    seen = {"loss": not train_step(engine, spoilt, 1, options, group).applied and _same(engine, before)}
    if rank == 1:  # a finite loss, and an infinite gradient on one rank only
        hook = next(iter(engine.module.image.parameters())).register_hook(lambda gradient: gradient * torch.inf)
        # of the first layer, which ZeRO-3 reduces last
    seen["gradient"] = not take_step(engine, 2, options, group).applied and _same(engine, before)
    if rank == 1:
        hook.remove()
    seen["afterwards"] = take_step(engine, 3, options, group).applied and not _same(engine, before)
    engine.destroy()
    return seen


def _everything(engine: Any) -> list[Tensor]:
    """This rank's part of the parameters' master copies and of the optimizer's state."""
    from train.engine_state import _optimizer, pieces

    found = []
    for piece in pieces(engine):
        found.append(piece.of(piece.held).clone())
        state = _optimizer(engine).state[piece.held]
        found += [torch.as_tensor(value).clone() for value in state.values()]
    return found


def _same(engine: Any, before: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(_everything(engine), before, strict=True))


@BOTH_PASSES
@EVERY_KIND
def test_what_is_not_finite_updates_nothing_on_any_rank(pool: Pool, kind: str, micro_batches: int) -> None:
    for seen in pool.run(_skipped, config(kind, micro_batches=micro_batches)):
        assert seen == {"loss": True, "gradient": True, "afterwards": True}


def _clamped(group: Any, options: Any) -> tuple[float, float, float]:
    made = engines.bundle()
    with torch.no_grad():
        made.module.log_scale.fill_(5.0)  # exp(5) is 148
    engine = start(group, options, made)
    first = take_step(engine, 0, options, group)
    from train.engine_state import pieces

    master = [float(piece.of(piece.held).max()) for piece in pieces(engine) if piece.name == "log_scale"]
    second = take_step(engine, 1, options, group)
    engine.destroy()
    return first.scale, second.scale, max(master, default=0.0)


@EVERY_KIND
def test_the_scale_and_its_master_copy_are_kept_at_100(pool: Pool, kind: str) -> None:
    found = pool.run(_clamped, config(kind))
    for first, second, _ in found:
        assert first == pytest.approx(148.4, abs=0.1)
        assert second == pytest.approx(100.0, rel=1e-6)
    masters = [master for _, _, master in found if master]
    assert masters and max(masters) == pytest.approx(engines.MAX_LOG_SCALE, rel=1e-7)


def _configured(group: Any, options: Any) -> Any:
    engine = start(group, options, engines.bundle())
    seen = engine.zero_reduce_bucket_size(), engine.zero_offload_optimizer().device, engine.gradient_clipping()
    engine.destroy()
    return seen


def test_options_of_deepspeed_reach_it_beside_ours(pool: Pool) -> None:
    options = config("2 offload", deepspeed={"zero_optimization": {"reduce_bucket_size": 1234}})
    assert pool.run(_configured, options) == [(1234, "cpu", options.optimizer.max_grad_norm)] * RANKS
