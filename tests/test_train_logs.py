"""Logs that are damaged or on a full disk, and errors of the system in words. Without processes of its own."""

from __future__ import annotations

import errno
import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from torch.utils import tensorboard

from train import checkpoint, logs
from train.main import _failed


def test_a_damaged_log_loses_the_damaged_lines(tmp_path: Path) -> None:
    lines = [b'{"step": 0, "loss": 1.0}', b"\xff\x00", b"3", b'{"step": "x"}', b'{"step": 1, "loss": "x"}', b"[" * 9999]
    (tmp_path / logs.METRICS).write_bytes(b"\n".join(lines))
    assert [row["step"] for row in logs.read_rows(tmp_path / logs.METRICS)] == [0, 1]
    logs.Log(tmp_path, 4, 10).close()
    assert logs.plot(tmp_path).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_log_on_a_full_disk_waits_for_room_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "SummaryWriter", partial(tensorboard.SummaryWriter, flush_secs=0))
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's, which collects
    values = dict.fromkeys(logs.BAR, 0.5)
    log = logs.Log(tmp_path, 0, 10)
    log.step(0, values)
    log.nonfinite(0, ("a",))
    places = {name: os.dup(file._file.fileno()) for name, file in log._files.items() if file._file is not None}
    for file in log._files.values():
        assert file._file is not None
        os.dup2(os.open("/dev/full", os.O_WRONLY), file._file.fileno())
    for path in (tmp_path / logs.EVENTS).iterdir():
        path.unlink()
        path.symlink_to("/dev/full")
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
    for name in (logs.METRICS, logs.NONFINITE, logs.EVENTS):
        assert out.count(f"warning: {name} cannot be written (No space left on device: {tmp_path}") == 1, (out, err)
        if name != logs.EVENTS:
            assert [row["step"] for row in logs.read_rows(tmp_path / name)] == [0, 1, 2, 3]
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("error", "said"),
    (
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b"), "error: No space left on device: /a/b ("),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "error: Permission denied: /a ("),
        (checkpoint.RunError("spoilt"), "error: spoilt\n"),
    ),
)
def test_what_no_line_of_code_explains_is_no_traceback(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _failed(error, None) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(said)
    assert shown.count("\n") == 1
