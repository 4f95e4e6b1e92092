"""A rank that dies, stops or raises ends the job on every other rank: within the time-out, with a message that names
it."""

from __future__ import annotations

import os
import signal
import socket
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import start_ranks

from softclip_kernels import Exchange, ops, softclip_loss
from softclip_kernels.distributed import failures, sharded
from softclip_kernels.testing import unit_rows

WORLD, VICTIM, TIMEOUT, STEP = 4, 2, 2.0, 3


def job(rank, world, folder, plan, how, where, victim=VICTIM, store=None):
    """Steps 0 to 2 go well. In step 3 the victim gets the signal, or raises and lives on, before the loss, or in the
    middle of one of its two laps."""
    torch.set_num_threads(1)
    store = store or f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    module, function = (ops, "block_backward") if where == "in its backward lap" else (sharded, "_statistics")
    compute, calls = getattr(module, function), 0

    def fail():
        (folder / "failed").write_text(str(time.monotonic()))
        if how == "raised":
            raise MemoryError("no room for a tile")
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls == (2 if plan == "ring" else 1):
            fail()
        return compute(*arguments)

    for step in range(STEP + 1):
        x, y = unit_rows(8, 4, seed=rank).requires_grad_(), unit_rows(8, 4, seed=rank + world).requires_grad_()
        if step == STEP and rank == victim:
            if where == "before the loss":
                fail()
            mock.patch.object(module, function, failing).start()
        scale = torch.tensor(10.0, dtype=torch.float64)
        try:
            softclip_loss(x, y, scale, group=Exchange(dist.group.WORLD, plan, timeout=TIMEOUT, step=step)).backward()
        except MemoryError as error:
            print(f"caught {error}")
            time.sleep(60)
    print("finished")


def survivors_end(processes, folder, said, victim=VICTIM):
    """Every other rank has ended with an error that names itself, the step, and what is `said`; returns how many
    seconds after the victim failed. The victim lives until then."""
    survivors = [rank for rank in range(WORLD) if rank != victim]
    for rank in survivors:
        processes[rank].join(60)
    ended = time.monotonic()
    processes[victim].kill()
    for rank in survivors:
        output = (folder / f"{rank}.txt").read_text()
        assert processes[rank].exitcode == 1, f"rank {rank} ended with {processes[rank].exitcode}:\n{output}"
        assert f"rank {rank} of {WORLD}, step {STEP}, " in output, output
        assert said in output, output
    return ended - float((folder / "failed").read_text())


@pytest.mark.parametrize("where", ("before the loss", "in its lap", "in its backward lap"))
@pytest.mark.parametrize("how", ("killed", "stopped"))
@pytest.mark.parametrize("plan", ("gather", "ring"))
def test_a_missing_rank_ends_the_job(plan, how, where):
    processes, folder = start_ranks(job, WORLD, plan, how, where)
    took = survivors_end(processes, folder, f"missing: rank {VICTIM}:")
    # A closed connection is seen at once, a silent one after the time-out; then the roll call, and a busy machine.
    allowed = (TIMEOUT if how == "stopped" else 0.0) + 4.0 + 8.0
    assert took < allowed


@pytest.mark.parametrize("where", ("in its lap", "in its backward lap"))
@pytest.mark.parametrize("plan", ("gather", "ring"))
def test_a_rank_that_raises_in_the_middle_of_an_exchange_tells_the_others(plan, where):
    """At once, although it lives on, as one does that catches the error: what failed, and where."""
    processes, folder = start_ranks(job, WORLD, plan, "raised", where)
    took = survivors_end(processes, folder, f": rank {VICTIM} failed with MemoryError: no room for a tile: ")
    assert "caught no room for a tile" in (folder / f"{VICTIM}.txt").read_text()
    assert took < 4.0 + 8.0


@pytest.mark.parametrize("how", ("killed", "stopped"))
def test_the_rank_that_holds_the_store_may_be_the_missing_one(how):
    """Then there is no roll call, but an end all the same, and a message that says whom to look for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes, folder = start_ranks(job, WORLD, "ring", how, "before the loss", 0, f"tcp://127.0.0.1:{port}")
    said = f", step {STEP}, agreement on shapes: {failures.NO_STORE}: "
    assert survivors_end(processes, folder, said, victim=0) < TIMEOUT + 4.0 + 8.0
