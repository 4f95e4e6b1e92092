"""Checkpoints of the trainer under crashes, full disks and damage. Without processes of its own but for forks of this
one, which are killed while they write."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.saved_runs import checkpoint_names, weights, write_checkpoint

from train import checkpoint

# --- Crashes and full disks


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def in_fork(act: Callable[[], Any]) -> int:
    """The exit status of a process that does `act`; negative: the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(moment: int) -> None:
    """Kill this process before the change of the disk with this number, counted from 0: a file opened for writing,
    flushed, renamed or removed, a folder made or removed."""
    left = moment
    flush = os.fsync

    def count() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            count()

    def fsync(handle: int) -> None:
        count()
        flush(handle)

    sys.addaudithook(hook)
    os.fsync = fsync


@pytest.mark.parametrize("damaged", (False, True), ids=("new", "in place of a damaged one"))
def test_a_kill_at_any_write_leaves_a_whole_checkpoint(
    tmp_path: Path, data: Path, files: dict[str, bytes], damaged: bool
) -> None:
    found: list[str] = []
    status = -signal.SIGKILL
    weights(8, data, files["tokenizer.json"])
    while status == -signal.SIGKILL:
        moment = len(found)
        run = tmp_path / str(moment)
        write_checkpoint(run, data, files, 4)
        if damaged:
            (write_checkpoint(run, data, files, 8) / checkpoint.WEIGHTS).write_bytes(b"")
        status = in_fork(lambda: (die_at(moment), write_checkpoint(run, data, files, 8)))  # noqa: B023
        newest = checkpoint.find(run, warn=lambda text: None)
        found.append(newest.name)
        step = int(newest.name.removeprefix("step-"))
        assert checkpoint.why_broken(newest) is None
        assert checkpoint.read_state(newest).step == step
        read = checkpoint.read_bundle(newest).module.state_dict()
        assert all(torch.equal(read[name], one) for name, one in weights(step, data, files["tokenizer.json"]).items())
        write_checkpoint(run, data, files, 8)  # the resumed run passes the same step again
        assert checkpoint.find(run).name == "step-000008"
        assert checkpoint_names(run) == ["latest", "step-000004", "step-000008"], "what the crash left is cleared away"
    assert status == 0
    assert len(found) > 20, "the moments were not counted"
    assert found == sorted(found)
    assert set(found) == {"step-000004", "step-000008"}


def full(path: Path) -> None:
    """Make every write to `path` end with ENOSPC."""
    path.symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.MANIFEST, checkpoint.LATEST))
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, data: Path, files: dict[str, bytes], name: str
) -> None:
    write_checkpoint(tmp_path, data, files, 4)

    def spoil(scratch: Path) -> None:
        if name in (checkpoint.WEIGHTS, checkpoint.STATE):
            full(scratch / name)
        else:
            folder = scratch if name == checkpoint.MANIFEST else scratch.parent
            full(folder / f".{name}.{os.getpid()}.tmp")

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_checkpoint(tmp_path, data, files, 8, spoil)
    assert checkpoint.find(tmp_path).name == "step-000004"
    write_checkpoint(tmp_path, data, files, 8)
    assert checkpoint_names(tmp_path) == ["latest", "step-000004", "step-000008"]


def test_a_flush_that_finds_the_disk_full_leaves_a_whole_checkpoint(
    tmp_path: Path, data: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, failures = os.fsync, 0
    write_checkpoint(tmp_path, data, files, 4)
    while True:
        left = failures

        def fsync(handle: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(handle)

        with monkeypatch.context() as patch, contextlib.suppress(OSError):
            patch.setattr(os, "fsync", fsync)
            write_checkpoint(tmp_path, data, files, 8)
            break
        failures += 1
        found = checkpoint.find(tmp_path)
        assert checkpoint.why_broken(found) is None
    assert failures > 8, "the flushes were not counted"
    assert checkpoint_names(tmp_path) == ["latest", "step-000004", "step-000008"]


# --- Order and damage


def test_only_the_newest_are_kept_and_one_of_each_long_interval(
    tmp_path: Path, data: Path, files: dict[str, bytes]
) -> None:
    for step in (4, 8, 12):
        write_checkpoint(tmp_path / "short", data, files, step)
    assert checkpoint_names(tmp_path / "short") == ["latest", "step-000008", "step-000012"]
    for step in range(4, 45, 4):  # the multiples of 10 lie between the steps
        write_checkpoint(tmp_path / "long", data, files, step, keep_every=10)
    kept = [f"step-{step:06d}" for step in (12, 20, 32, 40, 44)]
    assert checkpoint_names(tmp_path / "long") == ["latest", *kept]
    assert checkpoint.spared([4, 8], 0) == set()


def test_what_a_resumed_run_passed_over_counts_for_no_good_checkpoint(
    tmp_path: Path, data: Path, files: dict[str, bytes]
) -> None:
    for step in (4, 8, 12):
        write_checkpoint(tmp_path, data, files, step, keep=3)
    for step in (8, 12):
        damage(tmp_path / checkpoint.FOLDER / f"step-{step:06d}", "truncated")
    assert checkpoint.find(tmp_path, lambda text: None).name == "step-000004"
    write_checkpoint(tmp_path, data, files, 6)
    assert checkpoint.find(tmp_path).name == "step-000006"
    assert "step-000004" in checkpoint_names(tmp_path), "two good ones are left"


def damage(folder: Path, how: str) -> None:
    weights = folder / checkpoint.WEIGHTS
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "bit flipped":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "engine gone":
        (folder / checkpoint.ENGINE / "rank0.pt").unlink()
    elif how == "manifest empty":
        (folder / checkpoint.MANIFEST).write_text("{}")
    elif how == "manifest cut":
        (folder / checkpoint.MANIFEST).write_text("{")
    else:
        entries = json.loads((folder / checkpoint.MANIFEST).read_text())
        entries["../../outside"] = {"sha256": "", "bytes": 0}
        (folder / checkpoint.MANIFEST).write_text(json.dumps(entries))


DAMAGES = ("truncated", "bit flipped", "engine gone", "manifest empty", "manifest cut", "path outside")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_falls_back(tmp_path: Path, data: Path, files: dict[str, bytes], how: str) -> None:
    write_checkpoint(tmp_path, data, files, 4)
    damage(write_checkpoint(tmp_path, data, files, 8), how)
    warnings: list[str] = []
    assert checkpoint.find(tmp_path, warnings.append).name == "step-000004"
    assert "step-000008 is not whole" in warnings[0]
    damage(tmp_path / checkpoint.FOLDER / "step-000004", how)
    with pytest.raises(checkpoint.CheckpointError, match=r"no whole checkpoint.*step-000008, step-000004"):
        checkpoint.find(tmp_path, warnings.append)


def test_a_checkpoint_reloads(tmp_path: Path, data: Path, files: dict[str, bytes]) -> None:
    folder = write_checkpoint(tmp_path, data, files, 4)
    bundle = checkpoint.read_bundle(folder)
    fresh = weights(4, data, files["tokenizer.json"])
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in bundle.module.state_dict().items())
    assert bundle.files == files
    assert checkpoint.read_state(folder) == checkpoint.State(4, 0, 2, 1)


def test_a_step_with_more_digits_is_newer(tmp_path: Path, data: Path, files: dict[str, bytes]) -> None:
    for step in (999_998, 999_999, 1_000_000):
        write_checkpoint(tmp_path, data, files, step)
    assert checkpoint_names(tmp_path) == ["latest", "step-1000000", "step-999999"]
    (tmp_path / checkpoint.FOLDER / "step-by-hand").mkdir()
    (tmp_path / checkpoint.FOLDER / checkpoint.LATEST).unlink()
    assert checkpoint.find(tmp_path).name == "step-1000000"
