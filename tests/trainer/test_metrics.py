"""Logs that are resumed, damaged or on a full disk, and errors of the system in words. Without processes of its own."""

from __future__ import annotations

import errno
import math
import os
import re
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from torch.utils import tensorboard

from train import metrics
from train.cli import main
from train.files import explain


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    values = {"loss": 1.0, "alpha": 0.5, "scale": 14.0, "r1_image_to_text": 0.1, "r1_text_to_image": 0.2}
    log = metrics.Log(tmp_path, 0, 10)
    for step in range(6):
        log.step(step, values)
    log.row(2, {"heldout_r1_image_to_text": 0.3, "heldout_r1_text_to_image": 0.3})
    log.nonfinite(5, ("a", "b"))
    log.close()
    with (tmp_path / metrics.METRICS).open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a line
    resumed = metrics.Log(tmp_path, 4, 10)
    resumed.step(4, values | {"loss": math.nan})
    resumed.close()
    rows = metrics.read_rows(tmp_path / metrics.METRICS)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 2, 4]
    assert rows[-1]["loss"] is None
    assert metrics.read_rows(tmp_path / metrics.NONFINITE) == []
    assert metrics.plot(tmp_path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("terminal", (True, False))
def test_the_progress_bar_fills_no_log_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    clock = iter(range(10_000))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))  # a second passes between two looks at it
    values = dict.fromkeys(metrics.BAR, 0.5)
    log = metrics.Log(tmp_path, 0, 400)
    for step in range(400):
        log.step(step, values)
    shown = capsys.readouterr().err.count("\r")
    log.close()
    assert shown > 50 if terminal else shown < 20


def test_a_damaged_log_loses_the_damaged_lines(tmp_path: Path) -> None:
    lines = [b'{"step": 0, "loss": 1.0}', b"\xff\x00", b"3", b'{"step": "x"}', b'{"step": 1, "loss": "x"}', b"[" * 9999]
    (tmp_path / metrics.METRICS).write_bytes(b"\n".join(lines))
    assert [row["step"] for row in metrics.read_rows(tmp_path / metrics.METRICS)] == [0, 1]
    metrics.Log(tmp_path, 4, 10).close()
    assert metrics.plot(tmp_path).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_log_on_a_full_disk_waits_for_room_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "SummaryWriter", partial(tensorboard.SummaryWriter, flush_secs=0))
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's, which collects
    values = dict.fromkeys(metrics.BAR, 0.5)
    log = metrics.Log(tmp_path, 0, 10)
    log.step(0, values)
    log.nonfinite(0, ("a",))
    places = {name: os.dup(file._file.fileno()) for name, file in log._files.items() if file._file is not None}
    for file in log._files.values():
        assert file._file is not None
        os.dup2(os.open("/dev/full", os.O_WRONLY), file._file.fileno())
    for path in list((tmp_path / metrics.EVENTS).iterdir()):
        full = path.with_name("full")
        full.symlink_to("/dev/full")
        full.replace(path)  # at once: TensorBoard's thread would make the file anew
    for step in (1, 2):
        log.step(step, values)
        log.nonfinite(step, ("b",))
        time.sleep(0.5)  # TensorBoard's thread writes when it comes to it; what is asserted holds whenever that is
    for name, file in log._files.items():
        assert file._file is not None
        os.dup2(places[name], file._file.fileno())
    log.step(3, values)
    log.nonfinite(3, ("c",))
    log.close()
    out, err = capsys.readouterr()
    for name in (metrics.METRICS, metrics.NONFINITE, metrics.EVENTS):
        assert out.count(f"warning: {name} cannot be written (No space left on device: {tmp_path}") == 1, (out, err)
        if name != metrics.EVENTS:
            assert [row["step"] for row in metrics.read_rows(tmp_path / name)] == [0, 1, 2, 3]
    assert "Traceback" not in out + err


class InPieces:
    """Takes three bytes of a write."""

    def __init__(self) -> None:
        self.taken = b""

    def write(self, data: bytes) -> int:
        self.taken += data[:3]
        return len(data[:3])


def test_a_line_that_the_system_takes_in_pieces_is_whole(tmp_path: Path) -> None:
    lines, file = metrics._Lines(tmp_path / "log"), InPieces()
    lines._file = file  # type: ignore[assignment]
    lines.append("0123456789")
    lines.append("x")
    assert file.taken == b"0123456789\nx\n"


@pytest.mark.parametrize(
    ("error", "said"),
    (
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            r"No space left on device: /a/b \([0-9.]+ MB free\)",
        ),
        (PermissionError(errno.EACCES, "Permission denied", b"/a"), "Permission denied: /a"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("no number"), "no number"),
    ),
)
def test_an_error_of_the_system_in_words(error: OSError, said: str) -> None:
    assert re.fullmatch(said, explain(error))


def test_a_place_that_may_not_be_looked_at_is_named_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Path.is_dir raises where a folder above may not be searched; root, who may, sees no such folder."""

    def stat(path: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", stat)
    assert explain(OSError(errno.ENOSPC, "No space left on device", "/a/b")) == "No space left on device: /a/b"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--folder", str(tmp_path / "file" / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "Not a directory" in said and f"{tmp_path}/file/run" in said
