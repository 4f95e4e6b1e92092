"""A pool of processes that are the ranks of a process group, and the sharding of a problem over them.

The processes start once and run many cases. Groups of fewer ranks are subgroups of the pool.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import PYTHONPATH

PATIENCE = 60.0  # seconds that a case may take; ranks share a core or two

_groups: dict[tuple[int, ...], Any] = {}  # in a rank's process: members to group


def _context() -> Any:
    """One server imports what takes long; a rank is a fork of it, and starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.fx.experimental.symbolic_shapes", "softclip_kernels.testing", "pytest", "sympy"]
    )
    return context


class Pool:
    """`pool.run(function, *arguments)` calls function(group, *arguments) on the first `ranks` ranks (or on `members`)
    and returns their results in rank order. An exception on a rank is raised here, with the traceback of that rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        size = self.size
        context = _context()
        folder = tempfile.mkdtemp()
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, f"{folder}/rendezvous", theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(
        self, function: Callable[..., Any], *arguments: Any, ranks: int | None = None, members: Sequence[int] = ()
    ) -> list[Any]:
        if not self.processes:  # after a failure
            self._start()
        chosen = tuple(members) or tuple(range(ranks or self.size))
        for rank in range(self.size):
            self.pipes[rank].send((chosen, function, arguments))
        results = [self._result(rank) for rank in range(self.size)]
        return [results[rank] for rank in chosen]

    def _result(self, rank: int) -> Any:
        if not self.pipes[rank].poll(PATIENCE):
            self.close()
            raise TimeoutError(f"rank {rank} gave no result within {PATIENCE} s")
        failed, result = self.pipes[rank].recv()
        if failed:
            self.close()
            raise AssertionError(f"rank {rank}:\n{result}")
        return result

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []


def _serve(rank: int, size: int, rendezvous: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE / 2)
    )
    while True:
        members, function, arguments = pipe.recv()
        try:
            if members not in _groups:  # every rank of the pool takes part in making a group
                _groups[members] = dist.new_group(list(members))
            result = function(_groups[members], *arguments) if rank in members else None
            pipe.send((False, result))
        except Exception:
            pipe.send((True, traceback.format_exc()))


def start_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> tuple[list[Any], Path]:
    """Processes of their own for a test that kills some: function(rank, size, folder, *arguments), each process's
    output in folder/<rank>.txt. The caller joins them."""
    context = _context()
    folder = Path(tempfile.mkdtemp())
    processes = [
        context.Process(target=_redirected, args=(function, rank, size, folder, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes, folder


def _redirected(function: Callable[..., Any], rank: int, size: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    with open(folder / f"{rank}.txt", "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        function(rank, size, folder, *arguments)


def run_interpreters(code: str, size: int, patience: float = 2 * PATIENCE, **environment: str) -> list[str]:
    """What each of `size` Python interpreters printed that ran `code` as the ranks of a process group, from beginning
    to end: not forks, and with the exit status of the interpreter itself, which must be 0."""
    rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
    paths = {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(size):
        start = f"dist.init_process_group('gloo', init_method='{rendezvous}', rank={rank}, world_size={size})"
        command = [sys.executable, "-c", f"import torch.distributed as dist\n{start}\n{code}"]
        processes.append(
            subprocess.Popen(
                command, env={**os.environ, **paths, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    outputs = []
    try:
        for rank, process in enumerate(processes):
            outputs.append(process.communicate(timeout=patience)[0].decode())
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{outputs[-1]}"
    finally:
        for process in processes:
            process.kill()
    return outputs


def shares(counts: Sequence[int]) -> list[slice]:
    """The part of a global dimension that each rank holds."""
    return [slice(sum(counts[:rank]), sum(counts[: rank + 1])) for rank in range(len(counts))]
