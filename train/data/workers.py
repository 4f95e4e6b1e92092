"""The processes that read and prepare data: how they start, answer signals, fail and end.

They are forked, so that they share what is in memory, from a process that may be asked to stop at any moment (see
signals). A signal that reaches a whole process group must not end them before their rank, which still wants its step
and a checkpoint: they ignore it, and end with their rank instead.
"""

from __future__ import annotations

import atexit
import functools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..options import DataOptions
from ..signals import SIGNALS
from ..threads import cpu_count

MOST_WORKERS = 8  # that are started for each rank where nobody says how many
LOOK_SECONDS = 1.0
Items: TypeAlias = Generator[Any, None, None]
END = object()


class WorkerError(RuntimeError):
    """A worker process ended, as it does where memory is short."""


def count_workers(options: DataOptions, device: torch.device, ranks_here: int) -> int:
    """Worker processes of each rank. `ranks_here`: how many ranks share this machine."""
    if options.workers is not None:
        return options.workers
    if device.type != "cuda":
        return 0  # they would take the cores that the towers compute on
    return max(min(MOST_WORKERS, cpu_count() // ranks_here - 1), 1)


def produce(data: Dataset[Any], tasks: Sequence[Any] | None, *, workers: int, ahead: int, pin: bool) -> Items:
    """`data[task]` of each task in turn, or, of an IterableDataset, its items; made by so many processes, 0 for this
    one, which may be `ahead` items ahead. `pin`: in pinned memory, by the items' own `pin_memory`.

    Raises WorkerError where a process ends, and in this process what an item's making raises in any.
    """
    endless = isinstance(data, IterableDataset)
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=None if endless else tasks,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=functools.partial(_be_worker, os.getpid()) if workers else None,
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=max(2, math.ceil(ahead / workers)) if workers else None,
        generator=torch.Generator(),  # or it would draw from torch's global one
    )
    made = _Made(loader)
    try:
        while (item := made.wait()) is not END:
            yield item
    finally:
        made.close()


class _Made:
    """A loader's items, and the processes that make them."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        before = set(multiprocessing.active_children())
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until a new process has its own answer to them
        self._child_ended = signal.getsignal(signal.SIGCHLD)
        try:
            self._items = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._processes = list(set(multiprocessing.active_children()) - before)
        self._waiting = False
        if threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises wherever the main thread stands: in a collective, or while it saves.
            signal.signal(signal.SIGCHLD, lambda *_: self._check() if self._waiting else None)
        atexit.register(self.close)

    def wait(self) -> Any:
        """The next item, or END."""
        self._waiting = True
        try:
            self._check()
            return next(self._items, END)
        except RuntimeError:
            self._check()  # what PyTorch says of a lost process stands at the end of a long sentence
            raise
        finally:
            self._waiting = False

    def _check(self) -> None:
        """Raises WorkerError where a process has failed."""
        for process in self._processes:
            if process.exitcode:
                raise WorkerError(_describe(process.pid, process.exitcode))

    def close(self) -> None:
        atexit.unregister(self.close)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._child_ended)
        getattr(self._items, "_shutdown_workers", lambda: None)()  # its destructor, which an error may keep waiting
        for process in self._processes:
            if process.is_alive():  # it is stuck
                process.kill()
            process.join()


def _describe(process: int | None, code: int) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    why = ", which is what the kernel does where memory is short" if code == -signal.SIGKILL else ""
    return (
        f"the data's worker process {process} {how}{why}; lower data.workers, data.prefetch or "
        "optimizer.batch_size, or give the job more memory"
    )


def _be_worker(parent: int, _: int) -> None:
    """The first act of a worker process. What it ignores does not reach the rank's listener, either, whose pipe it
    has."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


def _as_it_is(item: Any) -> Any:
    return item
