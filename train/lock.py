"""One run, one job: a lock on a file of the run's folder, which the kernel frees however its holders end."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

FILE = "job.lock"
UNKNOWN_TO_THE_FILE_SYSTEM = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class LockedError(RuntimeError):
    """Another job works on the run."""


def hold(run: Path, patience: float = 0.0, what: str = "run") -> TextIO:
    """Take the run for this job; it holds as long as the returned file is open, here or in a process that inherits it.
    `patience`: seconds to wait for the job before, which may be ending; `what` the folder is, in words. Raises
    LockedError where another job holds it, or the folder cannot be written."""
    try:
        file = (run / FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise LockedError(
            f"{run / FILE} cannot be written ({error.strerror}); a {what} needs a folder that it can write to"
        ) from error
    try:
        if not take(file, patience):
            raise LockedError(
                f"the {what} {run} is in use by {_holder(file)}; wait for it, end it, or choose another --folder"
            )
    except OSError as error:
        if error.errno not in UNKNOWN_TO_THE_FILE_SYSTEM:
            raise
        print(
            f"warning: the file system of {run} has no locks ({error.strerror}): nothing keeps a second job from "
            "working on this run",
            file=sys.stderr,
        )
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
    file.flush()
    return file


def take(file: TextIO, patience: float) -> bool:
    """Whether the file's lock, which the kernel frees however its holders end, could be had within `patience` seconds.
    Raises OSError where the file system has none."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.2)


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        known = json.loads(file.read())
        return f"process {known['pid']} on {known['host']} since {known['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another job"  # which is writing its name
