"""Whether a distributed contrastive loss is exact, on a small model in DistributedDataParallel:
`python -m softclip_kernels.check [--loss MODULE:NAME] [--processes 2]`; see docs/exactness.md."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .losses.module import SoftClipLoss
from .testing import Report, check_exact

EXACT, WRONG, FAILED = 0, 1, 2  # exit status
PATIENCE = timedelta(seconds=120)  # that ranks wait for one another
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
FROM_THE_JOB = ("group", "rank", "world_size")  # what a factory is given if it asks


class Towers(nn.Module):
    """Two small towers and a learnable scale, on samples of 12 and 10 numbers: (x, y, scale) of shapes (N, 16), (N, 16)
    and ()."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, 16)) for width in (12, 10)
        )
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1), self.log_scale.exp()


def find_loss(name: str, options: Mapping[str, Any], group: Any) -> Callable[..., Any]:
    """The loss of MODULE:NAME: what it returns, called with the options and those of FROM_THE_JOB that it has as
    parameters; or, without options, itself if it has parameters of another name that must be given."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"--loss {name}: must be MODULE:NAME, for example my_package.losses:make_loss")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--loss {name}: {error}; is it in this folder or installed?") from error
    if not callable(found):
        raise ValueError(f"--loss {name} is a {type(found).__name__}; it must be a loss, or make one")
    parameters = inspect.signature(found).parameters.values()
    asked = {each.name for each in parameters if each.kind not in VARIADIC}
    needed = {each.name for each in parameters if each.name in asked and each.default is each.empty}
    if needed - {*FROM_THE_JOB, *options}:
        if options:
            raise ValueError(f"--loss {name} also needs {', '.join(sorted(needed - {*FROM_THE_JOB, *options}))}")
        return found
    unknown = () if any(each.kind is each.VAR_KEYWORD for each in parameters) else sorted(set(options) - asked)
    if unknown:
        raise ValueError(f"--loss {name} has no option {', '.join(unknown)}; it takes {', '.join(sorted(asked))}")
    job = {"group": group, "rank": dist.get_rank(group), "world_size": dist.get_world_size(group)}
    made = found(**({key: value for key, value in job.items() if key in asked} | dict(options)))
    if not callable(made):
        raise ValueError(f"--loss {name} made a {type(made).__name__}; it must make a loss, or be one of (x, y, scale)")
    return made


def check(arguments: argparse.Namespace) -> Report:
    """On a rank of the default group."""
    group, rank = dist.group.WORLD, dist.get_rank()
    loss = find_loss(arguments.loss, arguments.options, group) if arguments.loss else SoftClipLoss(group=group)
    torch.manual_seed(0)
    model = DistributedDataParallel(Towers())
    generator = torch.Generator().manual_seed(1 + rank)
    pairs = arguments.pairs + (rank if arguments.uneven else 0)
    return check_exact(model, tuple(torch.randn(pairs, width, generator=generator) for width in (12, 10)), loss)


def run_rank(arguments: argparse.Namespace, start: Mapping[str, Any]) -> int:
    """One rank's work and its exit status; rank 0 prints the report."""
    rank = start.get("rank", os.environ.get("RANK"))
    try:
        dist.init_process_group("gloo", timeout=PATIENCE, **start)
        try:
            report = check(arguments)
        finally:
            dist.destroy_process_group()
    except Exception as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return FAILED
    if int(rank) == 0:
        print(report, flush=True)
    return EXACT if report.ok else WRONG


def _ranks_process(arguments: argparse.Namespace, start: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    leave(run_rank(arguments, start))


def leave(status: int) -> NoReturn:
    """End this process at once: an interpreter that takes its time may abort in what is left of torch.distributed,
    after all work is done (docs/distributed.md)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_ranks(arguments: argparse.Namespace) -> int:
    """The exit status of a job of ranks that are started here."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder, 'rendezvous')}"
        processes = []
        for rank in range(arguments.processes):
            start = {"init_method": rendezvous, "rank": rank, "world_size": arguments.processes}
            processes.append(context.Process(target=_ranks_process, args=(arguments, start)))
            processes[-1].start()
        for process in processes:
            process.join()
    codes = [process.exitcode for process in processes]
    return max(code if code in (EXACT, WRONG) else FAILED for code in codes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m softclip_kernels.check", description=__doc__)
    parser.add_argument(
        "--loss",
        metavar="MODULE:NAME",
        help="a loss of (x, y, scale), the embeddings of a rank and the scale; or what makes one, which is given "
        "those of group, rank and world_size that it has parameters for. Without it: softclip_loss",
    )
    parser.add_argument("--options", metavar="JSON", type=_options, default={}, help="for what makes the loss")
    parser.add_argument("--processes", type=int, help="to start, on this machine's CPU (2); not under torchrun")
    parser.add_argument("--pairs", type=int, default=8, help="of each rank (8)")
    parser.add_argument("--uneven", action="store_true", help="rank r has r pairs more")
    given = parser.parse_args(arguments)
    if given.options and not given.loss:
        parser.error("--options are for a --loss; softclip_loss is made without")
    if given.pairs < 2:
        parser.error(f"--pairs {given.pairs}: a pair alone has no negatives; at least 2 are needed")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if given.processes is not None:
            parser.error("--processes is for a job of its own; here RANK and WORLD_SIZE are set, as torchrun does")
        return run_rank(given, {})
    given.processes = 2 if given.processes is None else given.processes
    if given.processes < 1:
        parser.error(f"--processes {given.processes}: at least 1 is needed")
    return start_ranks(given)


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f'{text} must be an object of names and values, for example {{"factor": 2}}')
    return options


if __name__ == "__main__":
    leave(main())
