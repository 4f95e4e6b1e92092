"""The tools for tuning (bench.gpu_tools) as flags of `python -m bench gpu`: each alone runs its own table only, in
three minutes at most, and leaves the acceptance record as it is."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from softclip_kernels.backends.cuda import kernels as cuda_kernels

from .. import Row
from ..gpu_tools import ab, breakdown, external, kernels, probe
from ..problems import LOSSES, Case
from ..records import RESULTS, Record, table
from ..short_run import Failed, Worker
from .compilation import SM90
from .plan import Scale
from .run import LABELS, NO_TIME, flat

SECONDS = 180.0  # of a tool, at most
LEAST = 10.0  # seconds: with fewer left a call is not begun, because a process takes as long to start
SHOWN = 12  # kernels of a breakdown, of which the record has all
TOOL_LABELS = (*LABELS, "kernel", "problem", "what", "base", "against", "check")


@dataclass(frozen=True)
class Call:
    """What a tool measures at once. `labels`: of the row that stands in its place where it fails or has no time."""

    labels: Row
    function: Callable[..., Any]
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Tool:
    """calls             made one after the other, with the options and the scale
    metavar           of the flag's values
    starts_processes  a call keeps to the seconds that it is told (`limit`) and starts the processes that it needs;
                      others run in one that is ended then
    forceable         --candidate means something to it
    """

    help: str
    calls: Callable[[argparse.Namespace, Scale], Iterator[Call]]
    metavar: tuple[str, ...] = ()
    starts_processes: bool = False
    forceable: bool = False


def _cases(options: argparse.Namespace, scale: Scale) -> Iterator[Case]:
    """Every loss, at the size that is timed first where none was asked for."""
    n = scale.first[:1] if options.n == scale.n else options.n
    d = scale.first[1:] if options.d == scale.d else options.d
    return (Case(loss, scale.dtypes[0], *size, scale.device) for size in product(n, d) for loss in LOSSES)


def _probe(options: argparse.Namespace, scale: Scale) -> Iterator[Call]:
    on = {"device": scale.device, "dtype": scale.dtypes[0], "sizes": scale.probe}
    yield Call({}, probe.probe, on | {"seconds": 10 * scale.seconds})


def _kernels(options: argparse.Namespace, scale: Scale) -> Iterator[Call]:
    for case in _cases(options, scale):
        arguments = {"case": case, "gemm": scale.gemm, "seconds": scale.seconds}
        yield Call(case.labels(), kernels.kernels, arguments)


def _breakdown(options: argparse.Namespace, scale: Scale) -> Iterator[Call]:
    for case in _cases(options, scale):
        yield Call(case.labels(), breakdown.breakdown, {"case": case, "seconds": scale.seconds})


def _ab(options: argparse.Namespace, scale: Scale) -> Iterator[Call]:
    base, against = (
        replace(setting, environment={**scale.environment, **setting.environment})
        for setting in map(ab.Setting.parse, options.ab)
    )
    for case in _cases(options, scale):
        labels = {"base": base.name, "against": against.name, **case.labels()}
        yield Call(labels, ab.ab, {"base": base, "against": against, "case": case, "rounds": options.rounds})


def _ncu(options: argparse.Namespace, scale: Scale) -> Iterator[Call]:
    (kernel,) = options.ncu
    for case in _cases(options, scale):
        one = external.Pass(case, _texts(options), scale.environment)
        yield Call({"kernel": kernel, **case.labels()}, external.ncu, {"kernel": kernel, "one": one})


def _sanitize(options: argparse.Namespace, scale: Scale) -> Iterator[Call]:
    """With Triton's first candidates and with the CUDA kernels, or with the candidate that was asked for."""
    forced = [options.candidate] if options.candidate or not _has_cuda_kernels(scale.device) else ["", SM90]
    for candidate, check, loss in product(forced, external.CHECKS, LOSSES):
        case = Case(loss, scale.dtypes[0], *scale.sanitized, scale.device)
        one = external.Pass(case, _texts(options) / candidate, scale.forcing(candidate).environment)
        labels = {"check": check, **case.labels(), "candidate": candidate}
        yield Call(labels, _sanitized, {"check": check, "one": one, "candidate": candidate})


def _sanitized(candidate: str, **arguments: Any) -> Row:
    return external.sanitize(**arguments) | ({"candidate": candidate} if candidate else {})


def _has_cuda_kernels(device: str) -> bool:
    return device == "cuda" and torch.cuda.is_available() and cuda_kernels.why_not(torch.device(device)) is None


def _texts(options: argparse.Namespace) -> Path:
    return (options.results or RESULTS) / "gpu_tools"


TOOLS = {
    "probe": Tool("what the device gives: bandwidths, matrix products of our shapes", _probe),
    "kernels": Tool("every kernel with every candidate tile shape", _kernels),
    "breakdown": Tool("where the time of a pass goes", _breakdown, forceable=True),
    "ab": Tool("two settings (candidates, NAME=VALUE) or trees (NAME=PATH) in turns", _ab, ("BASE", "AGAINST"), True),
    "ncu": Tool("Nsight Compute on one kernel of every loss", _ncu, ("REGEX",), True, forceable=True),
    "sanitize": Tool("compute-sanitizer on small sizes", _sanitize, starts_processes=True, forceable=True),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    for name, tool in TOOLS.items():
        if tool.metavar:
            parser.add_argument(f"--{name}", nargs=len(tool.metavar), metavar=tool.metavar, help=tool.help)
        else:
            parser.add_argument(f"--{name}", action="store_true", help=tool.help)


def wanted(options: argparse.Namespace) -> list[str]:
    return [name for name in TOOLS if getattr(options, name)]


def run_tools(options: argparse.Namespace, scale: Scale) -> int:
    """The exit code: 1 where a call failed or a row says that it did not pass."""
    failed = False
    record = Record("gpu_tools", scale.device, TOOL_LABELS, options.results)
    for name in wanted(options):
        for rows in _performed(name, options, scale):
            found = [row | {"candidate": options.candidate} for row in rows] if options.candidate else rows
            record.add(found, replace=all(row.get("outcome") != NO_TIME for row in found))
            failed |= any(row.get("passed") is False for row in found)
            print(_tables(found), flush=True)
    print(record.path)
    return int(failed)


def _performed(name: str, options: argparse.Namespace, scale: Scale) -> Iterator[list[Row]]:
    """A tool's rows, call by call."""
    tool, end = TOOLS[name], time.monotonic() + scale.patience * SECONDS
    scale = scale.forcing(options.candidate)
    worker = Worker(scale.prepare, scale.environment)
    try:
        for call in tool.calls(options, scale):
            left = end - time.monotonic()
            if left < LEAST:
                yield [{"kind": name, **call.labels, "outcome": NO_TIME}]
                continue
            try:
                if tool.starts_processes:
                    found = call.function(**call.arguments, limit=left)
                else:
                    found = worker.call(call.function, call.arguments, left)
            except Exception as error:
                line = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
                found = {**call.labels, "passed": False, "error": line, "details": getattr(error, "details", "")}
            rows = found if isinstance(found, list) else [found]
            if any("error" in row for row in rows):
                worker.end()  # the next call gets a fresh process: what failed may have left the device unusable
            yield [{"kind": name, **row} for row in rows]
    finally:
        worker.end()


def _tables(rows: list[Row]) -> str:
    """The rows, and of a pass by kernel the kernels that take longest; the record has the rest."""
    tables = [table([flat(row) for row in rows])]
    for row in rows:
        if isinstance(longest := row.get("kernels"), dict):
            lines = [{"ms": ms, "calls": calls, "kernel": kernel[:80]} for kernel, (calls, ms) in longest.items()]
            tables.append(table(lines[:SHOWN]))
    return "\n".join(tables)
