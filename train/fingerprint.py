"""What a run's results depend on besides its configuration: the data, the code, and the versions below it.

Every checkpoint holds one (`fingerprint.json`), so that a run that goes on can say what is no longer as it was.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path

import torch

import softclip_kernels

from .files import sha256_of

# Those that compute something of a step, where they are there.
PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "pillow", "open_clip_torch", "timm", "transformers")
CODE = ("*.py", "*.so", "*.pyd")  # what runs: an extension that was compiled anew is other code
SHORT = 12  # digits of a hash that a message shows


@dataclass(frozen=True)
class Fingerprint:
    """What a run's results depend on.

    data        of the training data, wherever they lie: see data.record.Source
    code        SHA-256 in hex of softclip_kernels and the trainer, compiled parts included
    versions    by name, the machine's kind among them
    evaluation  of the data that it is evaluated on, by name
    teachers    in the order of loss.teachers: `self`, `ema`, or the SHA-256 of a frozen one's weights; empty where the
                model alone teaches, as in all earlier versions, or nobody does
    """

    data: str = ""
    code: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    evaluation: dict[str, str] = field(default_factory=dict)
    teachers: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Raises ValueError or TypeError where the text is none."""
        made = cls(**json.loads(text))
        kinds = (str, str, dict, dict, list | tuple)
        if not all(isinstance(getattr(made, one.name), kind) for one, kind in zip(fields(cls), kinds, strict=True)):
            raise TypeError("a fingerprint holds two texts, two mappings and a list")
        return replace(made, teachers=tuple(made.teachers))


def take(data: str, evaluation: dict[str, str], device: torch.device, teachers: tuple[str, ...] = ()) -> Fingerprint:
    """Of the data and the teachers, and of what runs here, now."""
    return Fingerprint(data, of_code(), versions_of(device), evaluation, teachers)


def of_code() -> str:
    """Independent of git, of where the packages lie, of the trainer's name there, and of compiled Python."""
    total = hashlib.sha256()
    packages = {"softclip_kernels": Path(softclip_kernels.__file__).parent, "train": Path(__file__).parent}
    for name, package in packages.items():
        for path in sorted(path for pattern in CODE for path in package.rglob(pattern)):
            total.update(f"{name}/{path.relative_to(package).as_posix()} {sha256_of(path)}\n".encode())
    return total.hexdigest()


def versions_of(device: torch.device) -> dict[str, str]:
    """Of Python and the packages, and the machine's kind: with other ones, results may differ in their last bits."""
    versions = {"python": platform.python_version(), "softclip_kernels": softclip_kernels.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["platform"] = f"{platform.system()} {platform.machine()}"
    on_gpu = device.type == "cuda"
    versions["processor"] = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return versions


def other_data(then: Fingerprint, now: Fingerprint) -> str | None:
    """In words, where the data differ."""
    return None if then.data == now.data else f"{then.data[:SHORT]} then, {now.data[:SHORT]} now"


def other_teachers(then: Fingerprint, now: Fingerprint) -> str | None:
    """In words, where the teachers differ."""
    if then.teachers == now.teachers:
        return None
    before, after = (", ".join(name[:SHORT] for name in one.teachers or ("self",)) for one in (then, now))
    return f"{before} then, {after} now"


def other_software(then: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs in code and versions, each in words."""
    changes = [] if then.code == now.code else [f"code {then.code[:SHORT]}, now {now.code[:SHORT]}"]
    names: Iterable[str] = sorted(then.versions.keys() | now.versions.keys())
    pairs = ((name, then.versions.get(name, "unknown"), now.versions.get(name, "unknown")) for name in names)
    return changes + [f"{name} {old}, now {new}" for name, old, new in pairs if old != new]
