"""Signals of the children that tests start."""

from __future__ import annotations

import signal

# What a shell ignores for a job that it starts with &, and nohup; and what the trainer answers.
RESTORED = ("SIGINT", "SIGQUIT", "SIGHUP", "SIGTERM", "SIGUSR1")


def restore() -> None:
    """For Popen's preexec_fn: the child begins as in a terminal, whatever was ignored where the tests were started. An
    ignored signal stays ignored over fork and exec, and Python then installs no KeyboardInterrupt."""
    for name in RESTORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
