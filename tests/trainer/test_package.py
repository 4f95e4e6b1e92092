"""The trainer as people install it: the package softclip_train of the wheel, with the command softclip-train, away from
the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.jobs import configuration, steps_logged

from train import checkpoint, fingerprint, metrics

# What makes the package; the CPU extension is left out for want of a compiler.
SOURCES = ("softclip_kernels", "train", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")
TIMEOUT = 300


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=TIMEOUT
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"))
        else:
            shutil.copy(ROOT / name, folder)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    built = run(sys.executable, "-c", code, folder=folder, CXX="/nonexistent/c++")
    assert built.returncode == 0, built.stderr
    (made,) = (folder / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds ours."""
    folder = tmp_path_factory.mktemp("site")
    options = ("install", "--quiet", "--no-deps", "--no-index", "--target", str(folder))
    installed = run(sys.executable, "-m", "pip", *options, str(wheel), folder=folder)
    assert installed.returncode == 0, installed.stderr
    return folder


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_the_whole_trainer_and_no_package_called_train(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "softclip-train = softclip_train.__main__:main" in archive.read(entry_points).decode()
    assert {name.partition("/")[0] for name in names} == {"softclip_kernels", "softclip_train"}
    ours = {name for name in files_below(ROOT / "train") if "__pycache__" not in name}
    assert {name.removeprefix("softclip_train/") for name in names if name.startswith("softclip_train/")} == ours
    assert {"py.typed", "configs/emoji.yaml", "data/emoji/__init__.py"} <= ours


def test_the_installed_commands_are_named_as_they_are_called(site: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / metrics.METRICS).write_text(json.dumps({"step": 0, "loss": 1.0, "alpha": 0.0}) + "\n")
    for command in ((str(site / "bin" / "softclip-train"),), (sys.executable, "-m", "softclip_train")):
        helped = run(*command, "--help", folder=tmp_path, PYTHONPATH=str(site))
        assert helped.stdout.startswith("usage: softclip-train [-h]"), helped.stderr
        assert "  softclip-train plot RUN" in helped.stdout
        drawn = run(*command, "plot", "run", folder=tmp_path, PYTHONPATH=str(site))
        assert drawn.stdout == "run/curves.png\n", drawn.stderr
    refused = run(sys.executable, "-m", "softclip_train", "job.sede=1", folder=tmp_path, PYTHONPATH=str(site))
    assert refused.returncode == 2, refused.stderr
    assert "unknown option of 'job': sede" in refused.stderr


def test_an_installed_trainer_trains(site: Path, data: Path, tmp_path: Path) -> None:
    """Its ranks are started by the name it goes by: there is no other here."""
    file = configuration(tmp_path, data, steps=2, evaluate_every=0)
    command = (sys.executable, str(site / "bin" / "softclip-train"), "--config", str(file), "--folder", "run")
    done = run(*command, folder=tmp_path, PYTHONPATH=str(site), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert steps_logged(tmp_path / "run") == [0, 1]
    assert checkpoint.find(tmp_path / "run").name == "step-000002"


def test_the_fingerprint_of_the_code_does_not_depend_on_the_packages_name(tmp_path: Path) -> None:
    (tmp_path / "softclip_train").symlink_to(ROOT / "train")
    code = "from softclip_train.fingerprint import of_code; print(of_code())"
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    assert run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=path).stdout.strip() == fingerprint.of_code()
