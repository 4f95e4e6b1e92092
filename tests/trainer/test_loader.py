"""Batches from records: the same whoever makes them, whole in spite of bad records, and an end where it must come."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PYTHONPATH, signals
from helpers.sources import Listed, bad, broken, listed, prepare, tokenize
from PIL import Image

from train.data.loader import CHUNK, MOST_CHUNKS, Batch, Loader, Reading, chunk_ends, trial
from train.data.noise import Noisy
from train.data.record import DataError
from train.data.sampler import StepSampler
from train.data.workers import WorkerError, count_workers
from train.options import DataOptions
from train.world import World

CPU = torch.device("cpu")
NOISE = {"swap": 0.2, "near_swap": 0.2, "partial": 0.1, "wrong_word": 0.2, "junk": 0.1}
BAD = {number: bad(reason) for number, reason in ((3, "broken_image"), (17, "empty_caption"), (40, "broken_image"))}


def halved(images: Sequence[Image.Image], seeds: np.ndarray | None) -> torch.Tensor:
    """What a teacher of another size makes of them."""
    return prepare([image.resize((2, 2)) for image in images], seeds)


def shouted(captions: Sequence[str]) -> torch.Tensor:
    return tokenize([caption.upper() for caption in captions])[:, :9]


def loader(
    source: Listed | Noisy, rank: int = 0, ranks: int = 1, workers: int = 0, batch: int = 24, **sampling: Any
) -> Loader:
    sampler = StepSampler([len(source)], batch, 0, **sampling)
    options = DataOptions(workers=workers)
    reading = Reading(prepare, tokenize, options.max_pixels, ((halved, shouted), (prepare, tokenize)))
    return Loader(source, sampler, reading, options, World(rank, ranks, CPU, None))


def batches(source: Listed | Noisy, first: int = 0, last: int = 6, **how: Any) -> list[Batch]:
    with closing(loader(source, **how).batches(first, last)) as made:
        return list(made)


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.images, batch.tokens, batch.labels, batch.noise, *chain.from_iterable(batch.views)]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        all(map(torch.equal, tensors(one), tensors(other)))
        and len(one.views) == len(other.views)
        and (one.keys, one.bad) == (other.keys, other.bad)
        for one, other in zip(ours, theirs, strict=True)
    )


def together(shares: list[list[Batch]]) -> list[Batch]:
    """The ranks' shares of each step as one."""
    made = []
    for step in zip(*shares, strict=True):
        images, tokens, labels, noise, *others = map(torch.cat, zip(*map(tensors, step), strict=True))
        views = tuple(zip(others[::2], others[1::2], strict=True))
        keys = tuple(key for share in step for key in share.keys)
        bad = {reason: sum(share.bad.get(reason, 0) for share in step) for share in step for reason in share.bad}
        made.append(Batch(images, tokens, labels, noise, views, keys, bad))
    return made


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in each share, the last one smaller."""
    monkeypatch.setattr("train.data.loader.CHUNK", 5)


# --- The same batches


def test_a_batch_is_what_was_drawn() -> None:
    source = listed(60)
    drawn = StepSampler([60], 24, 0).draw(4)
    (batch,) = batches(source, 4, 5)
    assert batch.images.shape == (24, 3, 4, 4) and batch.images.dtype == torch.float32
    assert batch.tokens.shape == (24, 16) and batch.tokens.dtype == torch.int64
    assert batch.keys == tuple(f"r{number}" for number in drawn.record)
    assert batch.bad == {}
    assert batch.labels.tolist() == [-1] * 24 and batch.noise.tolist() == [0] * 24
    for position, number in enumerate(drawn.record.tolist()):
        assert batch.images[position, 1].floor().unique().tolist() == [number]
        caption = f"{number} in words {int(drawn.caption[position] * 3)}".encode()[:16]
        assert bytes(batch.tokens[position].tolist()).rstrip(b"\0") == caption
    assert len(batch.images[:, 2, 0, 0].unique()) == 24, "each has an augmentation of its own"


def test_teachers_see_the_same_pictures_and_captions_in_their_own_way() -> None:
    (batch,) = batches(listed(60, labels=20), 2, 3)
    (small, loud), (images, tokens) = batch.views
    assert torch.equal(images, batch.images) and torch.equal(tokens, batch.tokens)
    assert torch.equal(small, batch.images[:, :, :2, :2]), "pictures of one colour, under one augmentation seed"
    assert loud.shape == (24, 9)
    for ours, theirs in zip(batch.tokens.tolist(), loud.tolist(), strict=True):
        assert bytes(theirs) == bytes(ours).decode().upper().encode()[:9]
    assert batch.labels.tolist() == [int(key[1:]) % 20 for key in batch.keys] and batch.labels.dtype == torch.int64


@pytest.mark.parametrize("workers", (2, 4))
def test_workers_change_nothing(small_chunks: None, workers: int) -> None:
    source = Noisy(listed(60, 20, instead=BAD), NOISE, 1)
    alone = batches(source)
    assert {number for batch in alone for number in batch.noise.tolist()} == set(range(len(NOISE) + 1))
    assert sum(sum(batch.bad.values()) for batch in alone) > 3
    assert same(alone, batches(source, workers=workers))
    assert same(alone[2:], batches(source, 2, 6, workers=workers)), "a resumed run goes on with the same batches"


@pytest.mark.parametrize("ranks", (2, 3, 4))
def test_ranks_change_nothing(small_chunks: None, ranks: int) -> None:
    source = Noisy(listed(60, 20, instead=BAD), NOISE, 1)
    shares = [batches(source, rank=rank, ranks=ranks, workers=rank % 2) for rank in range(ranks)]
    assert all(len(share[0].keys) == 24 // ranks for share in shares)
    assert same(batches(source), together(shares))


def test_the_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(listed(60), workers=1)
    batches(listed(60))
    assert torch.equal(torch.get_rng_state(), before)


def test_chunks_make_up_the_share_and_are_never_too_many() -> None:
    for share, towers in ((1, 1), (CHUNK, 2), (CHUNK + 1, 1), (1000, 3), (100_000, 1), (100_000, 4)):
        ends = chunk_ends(share, towers)
        assert ends[-1] == share and ends == sorted(set(ends)) and len(ends) <= MOST_CHUNKS // towers
    assert chunk_ends(CHUNK * 2) == [CHUNK, CHUNK * 2]


def test_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.workers.cpu_count", lambda: 32)
    gpu, options = torch.device("cuda"), DataOptions()
    assert [count_workers(options, gpu, ranks) for ranks in (1, 2, 4, 8, 32)] == [8, 8, 7, 3, 1]
    assert count_workers(options, CPU, 1) == 0
    assert count_workers(DataOptions(workers=5), CPU, 1) == count_workers(DataOptions(workers=5), gpu, 8) == 5


# --- Bad records


@pytest.mark.parametrize("workers", (0, 2))
def test_bad_records_are_replaced_and_counted(workers: int) -> None:
    made = batches(listed(60, instead=BAD), last=10, workers=workers)
    sampler = StepSampler([60], 24, 0)
    expected: dict[str, int] = {}
    for step, batch in enumerate(made):
        assert len(batch.keys) == 24 and not {"r3", "r17", "r40"} & set(batch.keys)
        drawn = sampler.draw(step).record.tolist()
        for position, (number, key) in enumerate(zip(drawn, batch.keys, strict=True)):
            if number not in BAD:
                assert key == f"r{number}"
                continue
            spares = (sampler.spare(step, position, attempt) for attempt in range(1, 100))
            good = next(spare for spare in spares if spare is not None and spare.record not in BAD)
            assert key == f"r{good.record}"
            expected[BAD[number].args[0]] = expected.get(BAD[number].args[0], 0) + 1
    counted: dict[str, int] = {}
    for batch in made:
        for reason, count in batch.bad.items():
            counted[reason] = counted.get(reason, 0) + count
    assert counted.keys() == expected.keys()
    assert all(counted[reason] >= expected[reason] for reason in expected)  # spares may be bad, too


def test_pictures_that_cannot_be_decoded_are_bad_records() -> None:
    source = listed(60)
    object.__setattr__(source.records[5], "image", b"GIF89a")
    counted = [batch.bad for batch in batches(source, last=5)]
    assert {} in counted and {"not_an_image": 1} in counted


@pytest.mark.parametrize("workers", (0, 1))
def test_where_nothing_can_stand_in_the_data_are_refused(workers: int) -> None:
    with pytest.raises(DataError, match=r"step 0 has a bad record, and none of 100 others.*lower optimizer.batch_size"):
        batches(listed(24, instead={3: bad()}), workers=workers)
    with pytest.raises(DataError, match=r"are bad as well \(broken_image \d+\)"):
        batches(listed(99, instead={number: bad() for number in range(99)}), workers=workers)


def test_a_trial_finds_wrong_columns_before_the_first_step() -> None:
    options = DataOptions(source="pairs.csv")
    half = {number: bad("none") for number in range(0, 200, 2)}
    trial(listed(1), options)
    trial(listed(200, instead={number: half[number] for number in range(0, 180, 4)}), options)
    with pytest.raises(DataError, match=r"of 64 records all over data.source='pairs.csv', 64 are bad \(none 64\)"):
        trial(listed(200, instead={number: bad("none") for number in range(200)}), options)


# --- Ends


@pytest.mark.parametrize("workers", (0, 2))
def test_a_broken_source_is_an_error_in_its_own_words(workers: int) -> None:
    with pytest.raises(DataError, match=r"^the file pairs.tar is gone; bring it back$"):
        batches(listed(60, instead={number: broken() for number in range(60)}), workers=workers)


def test_a_lost_worker_is_named_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"worker process \d+ was ended by SIGKILL.*memory is short.*data.workers"):
        batches(Listed(["killed"] * 60), workers=2)
    assert time.monotonic() - began < 4, "PyTorch itself looks every 5 seconds"
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


def test_a_lost_worker_breaks_off_nothing_but_the_wait_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)  # as in a new process
    others = children(os.getpid())
    made = loader(listed(600), workers=1, batch=200).batches(0, 50)
    next(made)
    (worker,) = set(children(os.getpid())) - set(others)
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.5)  # a step, or a checkpoint
    with pytest.raises(WorkerError, match=rf"worker process {worker} was ended by SIGKILL"):
        list(made)


def test_no_process_is_left_by_an_iteration_that_ends_early() -> None:
    others = children(os.getpid())  # of other tests that this process serves
    with closing(loader(listed(600), workers=3).batches(0, 10_000)) as made:
        next(made)
        assert len(children(os.getpid())) == len(others) + 3
    assert children(os.getpid()) == others


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def stuck_after_a_step(batch: int) -> Listed:
    """Only what the first step reads can be read; a worker waits forever for the rest."""
    source, good = listed(600), StepSampler([600], batch, 0).draw(0).record.tolist()
    return Listed([one if number in good else "stuck" for number, one in enumerate(source.records)])


def test_a_worker_that_is_stuck_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.3)
    others = children(os.getpid())
    with closing(loader(stuck_after_a_step(24), workers=2).batches(0, 5)) as made:
        next(made)
    assert children(os.getpid()) == others


RANK = """
    import sys, time
    from train.signals import stop
    stop.listen()
    import torch
    from helpers.sources import listed
    from trainer.test_loader import loader, stuck_after_a_step

    stop.act_at_once(None)
    source = stuck_after_a_step(64) if sys.argv[1] == "stuck" else listed(600)
    batches = loader(source, workers=2, batch=64).batches(0, 10**9)
    next(batches)
    print("ready", flush=True)
    while not stop.request:
        next(batches)
    end = time.monotonic() + 2
    while time.monotonic() < end:  # what is left of the step
        next(batches)
    print(f"stopped by {stop.request}", flush=True)
"""


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process that trains on nothing, with two workers, until it is asked to stop."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RANK), request.param],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=signals.restore,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), ids=lambda one: one.name)
@pytest.mark.parametrize("rank", ("reading",), indirect=True)
def test_a_signal_to_the_whole_group_leaves_the_workers_to_their_rank(
    rank: subprocess.Popen[str], number: signal.Signals
) -> None:
    workers = children(rank.pid)
    os.killpg(rank.pid, number)
    said = rank.communicate(timeout=60)[0]
    assert said == f"stopped by {int(number)}\n", "it was counted once, and the step was ended with data"
    assert rank.returncode == 0
    assert len(workers) == 2 and not any(map(is_alive, workers))


@pytest.mark.parametrize("rank", ("reading", "stuck"), indirect=True)
def test_workers_die_with_their_rank(rank: subprocess.Popen[str]) -> None:
    workers = children(rank.pid)
    assert len(workers) == 2 and all(map(is_alive, workers))
    rank.kill()
    end = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
