"""What this machine can run, and why not the rest: `python -m softclip_kernels.info [--json]`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from typing import Any

import torch

from . import backends
from .problem import Problem, accumulation_dtype
from .version import __version__

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PACKAGES = ("torch", "triton", "numpy", "deepspeed")


def report() -> dict[str, Any]:
    """versions    package to version, None where it is not installed
    devices     the torch devices that the report covers, with their names
    backends    name to {"details": what the backend says of itself, "why_not": {device: {dtype: None or the reason}}}
    auto        {device: {dtype: the backend that backend="auto" takes for a plain CLIP loss}}
    cuda kernels  {"why_not": {device: None or the reason}, "versions": what they run with, where any device can}
    """
    devices = _devices()
    return {
        "versions": {"softclip_kernels": __version__, "python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "devices": devices,
        "backends": {
            name: {
                "details": _details(backend),
                "why_not": {
                    device: {_name(dtype): _why_not(backend, _probe(device, dtype)) for dtype in DTYPES}
                    for device in devices
                },
            }
            for name, backend in backends.registered().items()
        },
        "auto": {device: {_name(dtype): _automatic(_probe(device, dtype)) for dtype in DTYPES} for device in devices},
        "cuda kernels": _cuda_kernels(devices),
    }


def _details(backend: backends.Backend) -> dict[str, str]:
    try:
        return backend.details()
    except ValueError as error:
        return {"unusable": str(error)}


def _why_not(backend: backends.Backend, problem: Problem) -> str | None:
    try:
        return backend.why_not(problem)
    except ValueError as error:  # a setting in the environment that this machine cannot follow
        return str(error)


def _automatic(problem: Problem) -> str:
    try:
        return backends.choose(problem)[0].name
    except ValueError as error:
        return f"none: {error}"


def _cuda_kernels(devices: Iterable[str]) -> dict[str, Any]:
    from .backends.cuda import kernels

    reasons: dict[str, str | None] = {}
    for device in devices:
        try:
            reasons[device] = kernels.why_not(torch.device(device))
        except ValueError as error:
            reasons[device] = str(error)
    return {"why_not": reasons, "versions": kernels.versions() if None in reasons.values() else {}}


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return devices


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe(device: str, dtype: torch.dtype) -> Problem:
    x = torch.zeros(2, 8, dtype=dtype, device=device)
    return Problem(x, x, torch.ones((), dtype=accumulation_dtype(dtype), device=device), torch.arange(2, device=device))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(found: dict[str, Any]) -> str:
    lines = [f"{package} {version or 'not installed'}" for package, version in found["versions"].items()]
    lines += [f"{device}: {name}" for device, name in found["devices"].items()]
    for name, backend in found["backends"].items():
        details = _in_a_row(backend["details"])
        lines += ["", f"backend {name}" + (f" ({details})" if details else "")]
        for device, reasons in backend["why_not"].items():
            able = [dtype for dtype, reason in reasons.items() if reason is None]
            if able:
                lines.append(f"  {device}: {', '.join(able)}")
            for reason in dict.fromkeys(reason for reason in reasons.values() if reason is not None):
                unable = [dtype for dtype, other in reasons.items() if other == reason]
                lines.append(f"  {device}: not {', '.join(unable)}: {reason}")
    kernels = found["cuda kernels"]
    lines += ["", "CUDA kernels" + (f" ({_in_a_row(kernels['versions'])})" if kernels["versions"] else "")]
    lines += [
        f"  {device}: " + ("can run" if reason is None else f"not: {reason}")
        for device, reason in kernels["why_not"].items()
    ]
    lines += ["", "backend='auto' takes"]
    lines += [
        f"  {device}: " + ", ".join(f"{dtype} {name}" for dtype, name in choice.items())
        for device, choice in found["auto"].items()
    ]
    return "\n".join(lines)


def _in_a_row(values: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m softclip_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    found = report()
    print(json.dumps(found, indent=2) if parser.parse_args().json else _text(found))


if __name__ == "__main__":
    main()
