"""Asking a process of a job to stop: the signals that mean it, and the end of the launcher that started it.

Python runs a handler between two instructions of the main thread, which may stand in a collective for minutes. So the
handlers here do nothing, and a thread reads what the interpreter's own handler, in C, writes down for each signal.
Standard library only: the trainer listens before it imports what takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO, cast

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
STOPPED = 75  # exit status of a job that was asked to stop: sysexits' EX_TEMPFAIL, "try again later"
INTERRUPTED = 128 + signal.SIGINT  # and of one that was interrupted a second time
LAUNCHER = "TRAIN_LAUNCHER"  # in the environment of what launch.launch or a grid starts: the process id of that one
LOOK_SECONDS = 1.0
ORPHAN_SECONDS = 6.0  # which a rank has for its step and a checkpoint once its launcher is gone
ORPHANED = 999  # stands beside the signals' numbers


class StoppedError(Exception):
    """The job was asked to stop where nothing is left to be saved."""


def name_of(request: int) -> str:
    return "the end of its launcher" if request == ORPHANED else signal.Signals(request).name


class Stop:
    """Whether this process was asked to stop, and what happens then.

    request      a signal's number, ORPHANED, or 0 as long as nobody asked
    act_at_once  sets what the listening thread calls at the first request; None: nothing, for the main thread looks at
                 `request` where it can stop
    hurry        called before the process ends at the second SIGINT
    """

    def __init__(self) -> None:
        self.request = 0
        self.hurry: Callable[[], None] = lambda: None
        self._at_once: Callable[[str], None] | None = _end_early
        self._asked, self._lock = threading.Event(), threading.Lock()
        self._interrupted = False

    def listen(self) -> None:
        """Begin; to be called in the main thread of a process of its own. A signal that the parent had ignored stays
        ignored: SIGHUP under nohup, SIGINT in a script's background."""
        sys.stdout, sys.stderr = (cast(TextIO, Unbreakable(stream)) for stream in (sys.stdout, sys.stderr))
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
                signal.siginterrupt(number, False)
        parent = int(os.environ.get(LAUNCHER, os.getppid())) if {"RANK", LAUNCHER} & os.environ.keys() else None
        threading.Thread(target=self._listen, args=(reader, parent), name="signals", daemon=True).start()

    def act_at_once(self, act: Callable[[str], None] | None) -> None:
        """Have the listening thread call `act` at the first request, with its name; see the class."""
        with self._lock:
            self._at_once = act

    def wait(self, seconds: float) -> bool:
        """Whether a request is there within so many seconds, and what is called at once has returned: where that ends
        the process, nobody who waits goes on to say the same."""
        return self._asked.wait(seconds)

    def _listen(self, reader: int, parent: int | None) -> None:
        orphaned: float | None = None
        while True:
            ready, _, _ = select.select([reader], [], [], LOOK_SECONDS)
            for number in os.read(reader, 64) if ready else b"":
                if number in SIGNALS:
                    self._ask(number)
            if parent is None or os.getppid() == parent:
                continue
            if orphaned is None:
                orphaned = time.monotonic()
                self._ask(ORPHANED)
            if "RANK" in os.environ and time.monotonic() - orphaned > ORPHAN_SECONDS:
                end(f"rank {os.environ['RANK']}: the launcher is gone, and the step in progress took too long to save")

    def _ask(self, request: int) -> None:
        if request == signal.SIGINT:
            if self._interrupted:
                self.hurry()
                os._exit(INTERRUPTED)
            self._interrupted = True
        with self._lock:
            if self.request:
                return
            self.request = request
            if self._at_once is not None:
                self._at_once(name_of(request))
            self._asked.set()


class Unbreakable:
    """A text stream whose reader or terminal may go away: what can no longer be shown is no reason to lose a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(line: str) -> None:
    """Write a line to stderr from any thread; whoever read it may be gone."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def end(line: str | None) -> None:
    """End this process at once as one that was asked to stop."""
    if line is not None:
        say(line)
    os._exit(STOPPED)


def _end_early(request: str) -> None:
    """Before this process knows its run."""
    alone_or_first = os.environ.get("RANK", "0") == "0"
    end(f"stopped by {request} before the first step of this job" if alone_or_first else None)


stop = Stop()  # of this process
