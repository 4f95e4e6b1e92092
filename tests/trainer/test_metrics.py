"""Logs that are resumed, damaged or on a full disk, what the progress bar shows, and errors of the system in words.
Without processes of its own."""

from __future__ import annotations

import errno
import itertools
import math
import os
import re
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard

from train import console, metrics
from train.cli import main
from train.files import explain

# A row of a long run on large machines.
ROW = {
    "loss": 10.1234,
    "alpha": 0.25,
    "scale": 100.0,
    "r1_image_to_text": 0.987,
    "r1_text_to_image": 0.99,
    "samples_per_second": 12_345.6,
    "data_seconds": 0.01,
    "step_seconds": 12.345,
    "memory_bytes": 78.9e9,
    "skipped": 0,
    "bad": 0,
}


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = metrics.Log(tmp_path, 0, 10)
    for step in range(6):
        log.step(step, ROW)
    log.row(2, {"heldout_r1_image_to_text": 0.3, "heldout_r1_text_to_image": 0.3})
    log.nonfinite(5, ("a", "b"))
    log.close()
    with (tmp_path / metrics.METRICS).open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a line
    resumed = metrics.Log(tmp_path, 4, 10)
    resumed.step(4, ROW | {"loss": math.nan})
    resumed.close()
    rows = metrics.read_rows(tmp_path / metrics.METRICS)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 2, 4]
    assert rows[-1]["loss"] is None
    assert metrics.read_rows(tmp_path / metrics.NONFINITE) == []


def on_disk(run: Path) -> list[int]:
    return [row["step"] for row in metrics.read_rows(run / metrics.METRICS)]


def test_rows_go_to_the_disk_once_a_second_and_where_somebody_will_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("train.metrics.time.monotonic", lambda: now)
    log = metrics.Log(tmp_path, 0, 10)
    log.step(0, ROW)
    log.step(1, ROW)
    now = 0.9
    log.step(2, ROW)
    assert on_disk(tmp_path) == [0]
    now = 1.0
    log.step(3, ROW)
    log.step(4, ROW)
    assert on_disk(tmp_path) == [0, 1, 2, 3]
    for step, look in enumerate((log.flush, lambda: log.say("said"), lambda: log.nonfinite(6, ("a",)), log.close), 5):
        log.step(step, ROW)
        look()
        assert on_disk(tmp_path) == list(range(step + 1))
    assert [row["keys"] for row in metrics.read_rows(tmp_path / metrics.NONFINITE)] == [["a"]]


def test_tensorboard_reads_every_number_of_every_step(tmp_path: Path) -> None:
    log = metrics.Log(tmp_path, 0, 10)
    for step in range(3):
        log.step(step, ROW | {"loss": 2.0 - step})
    log.row(2, {"heldout_r1_image_to_text": 0.25})
    log.close()
    read = EventAccumulator(str(tmp_path / metrics.EVENTS)).Reload()
    assert sorted(read.Tags()["scalars"]) == sorted([*ROW, "heldout_r1_image_to_text"])
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert [event.step for event in read.Scalars("heldout_r1_image_to_text")] == [2]


def test_the_bar_shows_how_a_run_goes_on_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=60.0)  # a minute passes between two looks at it
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    bar = console.Bar(99_000, 100_000)
    bar.step(ROW)
    bar.step(ROW | {"skipped": 2, "bad": 13})
    bar.step({"loss": 1.0})
    bar.say("between")
    bar.close()
    out, err = capsys.readouterr()
    assert out == "between\n"
    where, row = (
        r"9900\d/100000 ETA \d\d:\d\d:\d\d, ",
        "12.3k/s 12.35s data=0.01s loss=10.123 α=0.25 scale=100.0 R@1=99%",
    )
    calm, troubled = [line.rstrip() for line in re.split(r"[\r\n]+", err) if "α=" in line][:2]
    assert re.fullmatch(f"{where}{re.escape(row)} 78.9GB", calm) and len(calm) <= 100, calm
    assert re.fullmatch(f"{where}{re.escape(row)} skip=2 bad=13 78.9GB", troubled), troubled
    assert re.search(f"{where}loss=1.000", err), err


def test_memory_is_what_the_process_holds() -> None:
    before = metrics.memory_in_use(torch.device("cpu"))
    held = torch.ones(256 << 20, dtype=torch.uint8)  # more than glibc keeps of what earlier tests freed
    assert 0.9 * held.nbytes < metrics.memory_in_use(torch.device("cpu")) - before < 2 * held.nbytes


@pytest.mark.parametrize("terminal", (True, False))
def test_the_progress_bar_fills_no_log_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    clock = iter(range(10_000))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))  # a second passes between two looks at it
    log = metrics.Log(tmp_path, 0, 400)
    for step in range(400):
        log.step(step, ROW)
    shown = capsys.readouterr().err.count("\r")
    log.close()
    assert shown > 50 if terminal else shown < 20


def test_a_damaged_log_loses_the_damaged_lines(tmp_path: Path) -> None:
    lines = [b'{"step": 0, "loss": 1.0}', b"\xff\x00", b"3", b'{"step": "x"}', b'{"step": 1, "loss": "x"}', b"[" * 9999]
    (tmp_path / metrics.METRICS).write_bytes(b"\n".join(lines))
    assert [row["step"] for row in metrics.read_rows(tmp_path / metrics.METRICS)] == [0, 1]
    metrics.Log(tmp_path, 4, 10).close()
    assert (tmp_path / metrics.METRICS).read_text() == '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": "x"}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_log_on_a_full_disk_waits_for_room_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "SummaryWriter", partial(tensorboard.SummaryWriter, flush_secs=0))
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's, which collects
    log = metrics.Log(tmp_path, 0, 10)
    log.step(0, ROW)
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
        log.step(step, ROW)
        log.nonfinite(step, ("b",))
        time.sleep(0.5)  # TensorBoard's thread writes when it comes to it; what is asserted holds whenever that is
    for name, file in log._files.items():
        assert file._file is not None
        os.dup2(places[name], file._file.fileno())
    log.step(3, ROW)
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
    lines.flush()
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
