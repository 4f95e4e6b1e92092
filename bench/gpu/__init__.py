"""The Triton kernels on a GPU: correctness first, then speed and memory, in one run of at most nine minutes.

python -m bench gpu                     everything; rows go to $OUT or bench/results/gpu/, with a plot beside them
python -m bench gpu --n 32768 --d 512   some sizes
python -m bench gpu --candidate NAME    with one tile shape, in rows of its own
python -m bench gpu --rehearse          every step on a machine without a GPU
python -m bench gpu --kernels           a tool's table alone, likewise --probe, --breakdown, --ab, --ncu, --sanitize
                                        (--n and --d: at these sizes; --candidate: with --breakdown, --ncu, --sanitize)

A run is a list of steps (`plan`), most important first. Each runs in another process (short_run) with a limit of its
own; one that fails is recorded with its error, one for which no time is left as such, and the run goes on. The record
is written after every step. Exit code 1: something failed; 2: no CUDA device, no triton or no such candidate.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..gpu_tools.ab import Setting
from . import compilation, rehearsal
from .plan import Scale, plan, schedule
from .run import Run, device_row
from .tools import TOOLS, add_flags, run_tools, wanted

CANNOT_RUN = 2  # exit code
REHEARSE = "--rehearse"


def parse(arguments: Sequence[str], scale: Scale) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=scale.n, help=f"batch sizes (default: {scale.n})")
    parser.add_argument("--d", type=int, nargs="+", default=scale.d, help=f"embedding widths (default: {scale.d})")
    parser.add_argument("--rounds", type=int, default=7, help="of a timing, at least (default: 7)")
    parser.add_argument("--minutes", type=float, default=scale.minutes, help="of the whole run (default: 8.5)")
    parser.add_argument("--suite", type=Path, default=scale.suite, help="the tests (default: test_triton_gpu.py)")
    parser.add_argument("--candidate", default="", help='a tile shape to force: NAME or "forward=NAME,backward=NAME"')
    parser.add_argument("--rivals", type=Path, help="a folder of other packages' wheels, timed at the standing size")
    parser.add_argument(REHEARSE, action="store_true", help="every step, tiny, in Triton's interpreter on a CPU")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    folder = os.environ.get("OUT") or (tempfile.gettempdir() if REHEARSE in arguments else None)
    parser.add_argument("--results", type=Path, default=folder, help="(default: $OUT, else bench/results/)")
    add_flags(parser)
    options = parser.parse_args(arguments)
    deaf = [f"--{name}" for name in wanted(options) if not TOOLS[name].forceable]
    if options.candidate and deaf:
        parser.error(f"--candidate means nothing to {', '.join(deaf)}")
    if min(*options.n, *options.d, options.rounds) < 1:
        parser.error(f"--n {options.n}, --d {options.d} and --rounds {options.rounds} must be at least 1")
    return options


def _unknown(options: argparse.Namespace, device: str) -> str:
    """What is wrong with the candidates that are named: to the tuner the name of another architecture's is as good as
    none, and the rows would bear it."""
    settings = [Setting.parse(text).environment.get(compilation.FORCED, "") for text in options.ab or ()]
    named = [part for value in (options.candidate, *settings) if value for part in value.split(",")]
    if not named:  # and this process leaves the device to its workers
        return ""
    from softclip_kernels.backends.triton import launch, shapes  # here, for machines without triton

    known = shapes.every_name(launch.architecture(torch.device(device)))
    wrong = ", ".join(sorted({name.strip().rpartition("=")[2] for name in named} - known))
    return wrong and f"no kernel has a candidate {wrong}; there are {', '.join(sorted(known))}"


def run(options: argparse.Namespace, scale: Scale) -> int:
    """The exit code of a whole run."""
    planned = list(plan(options, scale))
    print(schedule(planned, 60 * options.minutes), flush=True)
    whole = Run(options, scale)
    whole.add(device_row())
    for step in planned:
        whole.perform(step)
    return whole.finish()


def main(arguments: Sequence[str]) -> None:
    scale = rehearsal.SMALL if REHEARSE in arguments else Scale()
    options = parse(arguments, scale)
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: this benchmark needs it (pip install triton)", file=sys.stderr)
        raise SystemExit(CANNOT_RUN)
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device: this benchmark needs a GPU", file=sys.stderr)
        raise SystemExit(CANNOT_RUN)
    if unknown := _unknown(options, scale.device):
        print(unknown, file=sys.stderr)
        raise SystemExit(CANNOT_RUN)
    if code := (run_tools if wanted(options) else run)(options, scale):
        raise SystemExit(code)
