"""Runs a script or a module of a host where no GPU is: `python -m helpers.hosts.on_cpu [-m] SCRIPT [ARGUMENTS]`.

Faults of hosts that have nothing to do with a loss: torchvision's wheel does not import beside a torch for CPUs,
open_clip tells DistributedDataParallel the number of a CPU, and DeepSpeed compiles for minutes at its first start.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from bench.torchvision_beside_cpu import describe_torchvision


def accept_cpus() -> None:
    """Let DistributedDataParallel take `device_ids=[torch.device("cpu")]` for none."""
    original = DistributedDataParallel.__init__

    def __init__(self: Any, module: Any, device_ids: Any = None, **options: Any) -> None:
        if device_ids and all(torch.device(one).type == "cpu" for one in device_ids):
            device_ids = None
        original(self, module, device_ids, **options)

    DistributedDataParallel.__init__ = __init__  # type: ignore[method-assign]


def spare_a_build() -> None:
    """Let DeepSpeed reduce without its operator for shared memory, which it would compile."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def prepare() -> None:
    torch.set_num_threads(1)
    describe_torchvision()
    accept_cpus()


def main(arguments: list[str]) -> None:
    prepare()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        if "deepspeed" in Path(arguments[0]).read_text():
            spare_a_build()
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
