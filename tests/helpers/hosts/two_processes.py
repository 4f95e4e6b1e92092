"""What a module of helpers.hosts does in a job of two processes: `over_ranks(folder)`, on each of them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from helpers.ranks import run_interpreters

from . import on_cpu

PATIENCE = 500.0  # seconds; importing a host takes several on a busy machine


def run(module: str, folder: Path) -> list[dict[str, Any]]:
    """What helpers.hosts.<module>.over_ranks(folder) returned, by rank."""
    begin = f"from helpers.hosts import two_processes\ntwo_processes.rank_main({module!r}, {str(folder)!r})"
    run_interpreters(begin, 2, patience=PATIENCE)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def rank_main(module: str, folder: str) -> None:
    """Of one rank, once its process group is there."""
    on_cpu.prepare()
    host = importlib.import_module(f"helpers.hosts.{module}")
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()), NODE_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # asked for, and not used: the group is there
    torch.save(host.over_ranks(Path(folder)), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
