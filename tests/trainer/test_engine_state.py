"""An engine's part of a checkpoint: what is saved at some number of ranks and some ZeRO stage goes on at any other."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import engines
from helpers.engines import KINDS, assembled, config, groups_of, start, take_step, weights, write_checkpoint
from helpers.ranks import Pool

from train import engine_files
from train.engine import LossScale

BEFORE, AFTER = 3, 3  # steps before a checkpoint, and from it on
LONG = (pytest.mark.long, pytest.mark.timeout(3000))
# Ranks and kind, then and now: fewer and more ranks than before, every stage on both sides, offloading on either.
MOVES = (
    ((2, "1"), (2, "1")),
    ((2, "0"), (1, "3")),
    ((1, "1"), (2, "0")),
    ((2, "2"), (4, "3 offload both")),
    ((4, "3"), (2, "1 offload")),
    ((4, "2 offload"), (1, "2")),
    ((2, "3 offload parameters"), (4, "0")),
)
SOURCES = [(ranks, kind) for ranks in (1, 2, 4) for kind in KINDS]


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], Pool]]:
    """A whole job of so many ranks."""
    made: dict[int, Pool] = {}

    def of(ranks: int) -> Pool:
        if ranks not in made:
            made[ranks] = Pool(ranks)
        return made[ranks]

    yield of
    for pool in made.values():
        pool.close()


def _write(group: Any, options: Any, folder: Path) -> list[float]:
    """The losses of the steps after it, in a run that was not interrupted."""
    engine = start(group, options, engines.bundle())
    for step in range(BEFORE):
        take_step(engine, step, options, group)
    write_checkpoint(engine, folder)
    losses = [take_step(engine, step, options, group).loss for step in range(BEFORE, BEFORE + AFTER)]
    engine.destroy()
    return losses


def _go_on(group: Any, options: Any, source: Path, copy: Path) -> list[float]:
    from train.engine_state import load_engine

    engine = start(group, options, engines.bundle(seed=1))  # other weights, which must not stay
    load_engine(engine, source)
    write_checkpoint(engine, copy)
    losses = [take_step(engine, step, options, group).loss for step in range(BEFORE, BEFORE + AFTER)]
    engine.destroy()
    return losses


def _assert_moved(pools: Callable[[int], Pool], folder: Path, losses: list[float], to: Any, options: Any) -> None:
    copy = folder / f"{to[0]} {to[1]}"
    copy.mkdir()
    found = pools(to[0]).run(_go_on, options(to[1]), folder, copy)[0]
    assert found == pytest.approx(losses, rel=1e-6)
    before, after = assembled(folder), assembled(copy)
    assert before.keys() == after.keys() and len(before) >= 10
    assert all(torch.equal(before[name], after[name]) for name in before), "the state is moved, not computed"
    assert groups_of(folder) == groups_of(copy)


@pytest.mark.parametrize(("source", "to"), MOVES)
def test_a_run_goes_on_with_other_ranks_and_another_stage(
    pools: Callable[[int], Pool], tmp_path: Path, source: tuple[int, str], to: tuple[int, str]
) -> None:
    losses = pools(source[0]).run(_write, config(source[1]), tmp_path)[0]
    _assert_moved(pools, tmp_path, losses, to, config)


@pytest.mark.parametrize("source", [pytest.param(source, marks=LONG) for source in SOURCES])
def test_from_anywhere_a_run_goes_on_anywhere(
    pools: Callable[[int], Pool], tmp_path: Path, source: tuple[int, str]
) -> None:
    losses = pools(source[0]).run(_write, config(source[1]), tmp_path)[0]
    for to in SOURCES[SOURCES.index(source) % 9 :: 9]:  # all 729 moves take ten minutes
        _assert_moved(pools, tmp_path, losses, to, config)


def test_so_does_one_with_another_optimizer(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    def sgd(kind: str) -> Any:
        return config(kind, name="sgd", lr=0.1)

    losses = pools(2).run(_write, sgd("3"), tmp_path)[0]
    copy = tmp_path / "copy"
    copy.mkdir()
    assert pools(1).run(_go_on, sgd("2"), tmp_path, copy)[0] == pytest.approx(losses, rel=1e-6)
    assert {name.split()[-1] for name in assembled(copy)} == {"momentum_buffer"}


def _same_again(group: Any, options: Any, folder: Path) -> bool:
    """Whether a run that goes on from a checkpoint equals the uninterrupted one bit for bit."""
    from train.engine_state import load_engine

    ends = []
    for resumed in (False, True):
        engine = start(group, options, engines.bundle(seed=int(resumed), precision=options.job.precision))
        if resumed:
            load_engine(engine, folder)
        for step in range(BEFORE if resumed else 0, BEFORE + AFTER):
            if step == BEFORE and not resumed:
                write_checkpoint(engine, folder)
            take_step(engine, step, options, group)
        ends.append((weights(engine), engine.scaler))
        engine.destroy()
    (one, scaler), (other, again) = ends
    return all(torch.equal(one[name], other[name]) for name in one) and scaler == again


@pytest.mark.parametrize("micro_batches", (1, 3))
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_same_ranks_and_stage_it_equals_the_uninterrupted_run(
    pools: Callable[[int], Pool], tmp_path: Path, kind: str, micro_batches: int
) -> None:
    assert pools(2).run(_same_again, config(kind, micro_batches=micro_batches), tmp_path) == [True, True]


def test_the_loss_scale_goes_on_too(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    assert pools(2).run(_same_again, config("1", precision="fp16"), tmp_path) == [True, True]
    content = engine_files.read(tmp_path / "engine" / engine_files.file_of(0))
    assert content["loss_scale"]["value"] < LossScale().value, "the first steps should have overflowed"


def _before_any_step(group: Any, options: Any, folder: Path) -> bool:
    from train.engine_state import load_engine

    engine = start(group, options, engines.bundle())
    write_checkpoint(engine, folder)
    engine.destroy()
    engine = start(group, options, engines.bundle(seed=1))
    load_engine(engine, folder)
    applied = take_step(engine, 0, options, group).applied
    engine.destroy()
    return applied


@pytest.mark.parametrize("kind", ("0", "1", "3"))
def test_a_checkpoint_of_no_step_is_one(pools: Callable[[int], Pool], tmp_path: Path, kind: str) -> None:
    assert pools(2).run(_before_any_step, config(kind), tmp_path) == [True, True]


def _nonfinite(group: Any, options: Any, folder: Path) -> Any:
    from train.engine_state import _optimizer, nonfinite, pieces

    engine = start(group, options, engines.bundle())
    take_step(engine, 0, options, group)
    seen: dict[str, Any] = {"good": nonfinite(engine, weights(engine), group)}
    if dist.get_rank() == dist.get_world_size() - 1:
        piece = pieces(engine)[-1]
        piece.of(_optimizer(engine).state[piece.held]["exp_avg"])[-1] = torch.nan
        seen["spoilt"] = f"{piece.name} (exp_avg)"
    seen["state"] = nonfinite(engine, weights(engine), group)
    write_checkpoint(engine, folder)
    if dist.get_rank() == dist.get_world_size() - 1:
        piece = next(piece for piece in pieces(engine) if piece.name == "image.1.weight")
        piece.of(piece.held)[-1] = torch.nan
    seen["master"] = nonfinite(engine, weights(engine), group)
    engine.destroy()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_named_by_all_ranks(pools: Callable[[int], Pool], tmp_path: Path, kind: str) -> None:
    seen = pools(2).run(_nonfinite, config(kind), tmp_path)
    assert [one["good"] for one in seen] == [[], []]
    assert [one["state"] for one in seen] == [[seen[-1]["spoilt"]]] * 2
    assert seen[0]["master"] == seen[1]["master"] and "image.1.weight (master copy)" in seen[0]["master"]
    problem = engine_files.why_unusable(tmp_path / "engine", 2)
    # At stage 0 the first rank's state is the one that is saved.
    assert problem is None if kind == "0" else "holds NaN or infinity" in str(problem)


def _copied(group: Any, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole model, on rank 0, and what every rank has in towers of its own."""
    from train.engine_state import copy_weights

    engine, beside = start(group, options, engines.bundle()), engines.bundle(seed=1).module
    engine.module.mean += dist.get_rank()
    take_step(engine, 0, options, group)
    copy_weights(engine, beside)
    whole = weights(engine)
    engine.destroy()
    return whole, dict(beside.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_towers_beside_an_engine_have_the_weights_that_a_checkpoint_has(
    pools: Callable[[int], Pool], kind: str
) -> None:
    found = pools(2).run(_copied, config(kind))
    whole = found[0][0]
    for _, copied in found:
        assert copied.keys() == whole.keys()
        assert all(torch.equal(copied[name], whole[name]) for name in whole), "buffers are those of rank 0"


def _full_disk(group: Any, options: Any, folder: Path) -> str:
    from train.engine_state import save_engine

    engine = start(group, options, engines.bundle())
    if dist.get_rank() == 1:
        (folder / engine_files.file_of(1)).symlink_to("/dev/full")
    dist.barrier()
    try:
        save_engine(engine, folder)
        return "saved"
    except OSError as error:
        return f"{errno.errorcode[error.errno or 0]} {Path(error.filename).name}"
    finally:
        engine.destroy()


def test_a_disk_that_is_full_for_one_rank_is_that_ranks_error(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    assert pools(2).run(_full_disk, config("1"), tmp_path) == ["saved", f"ENOSPC {engine_files.file_of(1)}"]


def _other_towers(group: Any, options: Any, folder: Path) -> str:
    from train.checkpoint import CheckpointError
    from train.engine_state import load_engine

    engine = start(group, options, engines.bundle())
    write_checkpoint(engine, folder)
    engine.destroy()
    made = engines.bundle()
    made.module.text[2] = torch.nn.Linear(60, 9)
    made.module.image[3] = torch.nn.Linear(20, 9)
    engine = start(group, options, made)
    try:
        load_engine(engine, folder)
        return "loaded"
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()


@pytest.mark.parametrize("kind", ("0", "2", "3"))
def test_a_checkpoint_of_other_towers_is_an_error(pools: Callable[[int], Pool], tmp_path: Path, kind: str) -> None:
    for said in pools(2).run(_other_towers, config(kind), tmp_path):
        assert f"{tmp_path}: the run cannot go on from it" in said and "remove this checkpoint" in said


def _part(**changes: Any) -> dict[str, Any]:
    part = {"name": "a", "start": 0, "count": 3, "cut": {"exp_avg": torch.ones(3)}, "whole": {"step": torch.ones(())}}
    return {"format": engine_files.FORMAT, "parts": [part], "groups": [{"lr": 0.1}], "loss_scale": None, **changes}


def test_files_that_no_run_can_go_on_from_are_found_out(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    engine_files.write(engine / engine_files.file_of(0), _part())
    assert engine_files.why_unusable(engine, 1) is None
    assert "of the 2 ranks" in str(engine_files.why_unusable(engine, 2))
    engine_files.write(engine / engine_files.file_of(1), _part(format=2))
    assert "of the 1 ranks" in str(engine_files.why_unusable(engine, 1))
    assert "rank-00001.pt is not of this version" in str(engine_files.why_unusable(engine, 2))
    engine_files.write(engine / engine_files.file_of(1), _part(groups=[torch.tensor([torch.inf])]))
    assert "rank-00001.pt holds NaN or infinity" in str(engine_files.why_unusable(engine, 2))
    engine_files.write(engine / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {})
    assert "an earlier version wrote it" in str(engine_files.why_unusable(engine, 2))
