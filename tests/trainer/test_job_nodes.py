"""One job on several machines, as torchrun starts it: here both are this one. Each start costs about ten seconds of
imports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch
from helpers.jobs import TIMEOUT, configuration, finish, start, training_rows, wait_for
from safetensors.torch import load_file

from train import checkpoint

STEPS = 24
# What depends on the clock and the machine.
MEASURED = ("samples_per_second", "data_seconds", "step_seconds", "memory_bytes")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_nodes(*arguments: str) -> list[subprocess.Popen[str]]:
    """Two of one rank each."""
    shared = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    launchers = [("torch.distributed.run", "--node-rank", str(node), *shared) for node in range(2)]
    return [start(*arguments, launcher=launcher) for launcher in launchers]


def rows(run: Path) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name not in MEASURED} for row in training_rows(run)]


def test_two_nodes_train_as_one_and_say_which_is_lost(data: Path, tmp_path: Path) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    file = configuration(tmp_path, data, steps=STEPS, processes=2)
    status, said = finish(start("--config", str(file), "--folder", str(alone)))
    assert status == 0, said

    arguments = ("--resume", "auto", "--config", str(file), "--folder", str(run))
    nodes = start_nodes(*arguments)
    place = wait_for(run, 1, lambda place: place.step >= 9)
    os.kill(place.pid, signal.SIGKILL)  # the node is gone at once: its rank, then what would report that
    nodes[1].kill()
    nodes[1].communicate(timeout=TIMEOUT)
    status, said = finish(nodes[0])
    assert status != 0
    assert "error: rank 0, step " in said and "lost contact with another rank" in said, said
    assert "Last seen: rank 1: step " in said, said

    for node in start_nodes(*arguments):
        status, said = finish(node)
        assert status == 0, said
    assert rows(run) == rows(alone)
    ours, theirs = (load_file(checkpoint.find(one) / checkpoint.WEIGHTS) for one in (run, alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
