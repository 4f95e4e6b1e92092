"""The tools for tuning (bench.gpu_tools) as flags of `python -m bench gpu`: each alone runs its own table only, in
three minutes at most, and leaves the acceptance record as it is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import Row
from ..gpu_tools import ab, breakdown, external, kernels, probe
from ..problems import LOSSES, Case
from ..records import RESULTS, Record, table
from ..short_run import Failed, Worker
from .plan import Scale
from .run import LABELS

SECONDS = 180.0  # of a call, at most
TOOL_LABELS = (*LABELS, "kernel", "problem", "what", "base", "against", "check")

Calls = Iterator[tuple[Callable[..., Any], dict[str, Any]]]


@dataclass(frozen=True)
class Tool:
    """`calls` are made with the options and the scale; in a process of their own, unless they start those they need."""

    help: str
    calls: Callable[[argparse.Namespace, Scale], Calls]
    metavar: tuple[str, ...] = ()
    starts_processes: bool = False


def _case(scale: Scale, loss: str = "hard") -> Case:
    return Case(loss, scale.dtypes[0], *scale.first, scale.device)


def _probe(options: argparse.Namespace, scale: Scale) -> Calls:
    on = {"device": scale.device, "dtype": scale.dtypes[0], "sizes": scale.probe}
    yield probe.probe, on | {"seconds": 10 * scale.seconds}


def _kernels(options: argparse.Namespace, scale: Scale) -> Calls:
    for loss in LOSSES:
        yield kernels.kernels, {"case": _case(scale, loss), "gemm": scale.gemm, "seconds": scale.seconds}


def _breakdown(options: argparse.Namespace, scale: Scale) -> Calls:
    for loss in LOSSES:
        yield breakdown.breakdown, {"case": _case(scale, loss), "seconds": scale.seconds}


def _ab(options: argparse.Namespace, scale: Scale) -> Calls:
    base, against = map(ab.Setting.parse, options.ab)
    for loss in LOSSES:
        yield ab.ab, {"base": base, "against": against, "case": _case(scale, loss), "rounds": options.rounds}


def _ncu(options: argparse.Namespace, scale: Scale) -> Calls:
    (kernel,) = options.ncu
    yield external.ncu, {"kernel": kernel, "case": _case(scale), "folder": _texts(options)}


def _sanitize(options: argparse.Namespace, scale: Scale) -> Calls:
    yield external.sanitize, {"folder": _texts(options), "dtype": scale.dtypes[0], "device": scale.device}


def _texts(options: argparse.Namespace) -> Path:
    folder: Path = (options.results or RESULTS) / "gpu_tools"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


TOOLS = {
    "probe": Tool("what the device gives: bandwidths, matrix products of our shapes", _probe),
    "kernels": Tool("every kernel with every candidate tile shape", _kernels),
    "breakdown": Tool("where the time of a pass goes", _breakdown),
    "ab": Tool("two settings (candidates, NAME=VALUE) or trees (NAME=PATH) in turns", _ab, ("BASE", "AGAINST"), True),
    "ncu": Tool("Nsight Compute on one kernel", _ncu, ("REGEX",), True),
    "sanitize": Tool("compute-sanitizer on small sizes", _sanitize, starts_processes=True),
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
    rows: list[Row] = []
    record = Record("gpu_tools", scale.device, TOOL_LABELS, options.results)
    for name in wanted(options):
        for function, arguments in TOOLS[name].calls(options, scale):
            found = _called(name, function, arguments, scale)
            record.add(found)
            rows += found
            print(table([_cells(row) for row in found]), flush=True)
    print(record.path)
    return int(any(row.get("passed") is False for row in rows))


def _called(name: str, function: Callable[..., Any], arguments: dict[str, Any], scale: Scale) -> list[Row]:
    worker = Worker(scale.prepare, scale.environment)
    try:
        if TOOLS[name].starts_processes:
            found = function(**arguments)
        else:
            found = worker.call(function, arguments, scale.patience * SECONDS)
    except Failed as failure:
        case = arguments.get("case")
        labels = {"kind": name, **(case.labels() if case else {})}
        return [labels | {"passed": False, "error": str(failure), "details": failure.details}]
    finally:
        worker.end()
    return found if isinstance(found, list) else [found]


def _cells(row: Row) -> Row:
    """What has a place in a table: the rest is in the record. A table within a row is spread."""
    flat = {key: value for key, value in row.items() if not isinstance(value, dict) and key != "details"}
    return flat | {f"{key} ms": value for key, value in row.get("phases", {}).items()}
