"""Several interpreters that start at once, as the ranks of a job do, on caches that are empty or hold rubbish: each has
the right result, the same tiles and the same code, and what they leave behind is whole."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.backends import TRITON

from softclip_kernels.backends import cpu
from softclip_kernels.testing import dense_loss, unit_rows

PROCESSES = 3
CUT_OFF = '{"format": 2, "tiles": {"key": [128, 128, 64'

# The loss through `auto`; then the choice of tiles through the shared file, with a GPU's times made up, and a kernel
# through Triton's own cache.
START = """
import hashlib, json, sys, warnings
import torch
warnings.simplefilter("ignore")
from softclip_kernels import softclip_loss
from softclip_kernels.backends import cpu
from softclip_kernels.testing import unit_rows
x, y = (unit_rows(300, 16, seed=seed, dtype=torch.float32).requires_grad_() for seed in (0, 1))
loss = softclip_loss(x, y, torch.tensor(10.0))
loss.backward()
bits = hashlib.sha256(x.grad.numpy().tobytes() + y.grad.numpy().tobytes()).hexdigest()
tile = code = None
if sys.argv[1] == "triton":
    from softclip_kernels.backends.triton import tuning
    from softclip_kernels.backends.triton.shapes import candidates
    torch.cuda.is_current_stream_capturing = lambda: False
    shapes = candidates("forward", "none", True, 2, "sm_90")
    tuning.measure = lambda launch: 1.0 + (shapes.index(launch) - 2) ** 2
    for key in ("key", *(f"key {index}" for index in range(30))):
        trial, device = lambda shape: (shape, 1), torch.device("cuda")
        chosen = tuning.choose("forward", lambda key=key: key, shapes, trial, 2**30, device)
        tile = shapes.index(chosen)
        assert tile == 2, key
    from bench.aot import variants
    plain = variants.Variant("coefficients", "none", shapes[0], features=frozenset())
    code = hashlib.sha256(variants.compile_variant(plain, "sm_90").asm["ptx"].encode()).hexdigest()
print(json.dumps([cpu.why_missing() is None, loss.item(), bits, tile, code]))
"""


def start_at_once(root: Path, cache: Path) -> list[list[object]]:
    path = os.pathsep.join((str(root), str(ROOT)))  # the package from root, bench from here
    environment = os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_CACHE_DIR": str(cache / "triton")}
    environment.pop("SOFTCLIP_AUTOTUNE", None)
    command = [sys.executable, "-c", START, "triton" if TRITON else ""]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(command, cwd=root, env=environment, stdout=pipe, stderr=pipe, text=True)
        for _ in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * PROCESSES, said
    return [json.loads(output) for output, _ in said]


def assert_right(results: list[list[object]], built: bool) -> None:
    x, y = (unit_rows(300, 16, seed=seed, dtype=torch.float32).double() for seed in (0, 1))
    exact = dense_loss(x, y, torch.tensor(10.0)).item()
    for there, loss, bits, tile, code in results:
        assert there == built
        assert loss == pytest.approx(exact, rel=1e-6)
        assert bits == results[0][2] and tile == (2 if TRITON else None) and code == results[0][4]


def assert_whole(cache: Path) -> None:
    """One file with every key, and none half-written beside it."""
    (file,) = (cache / "softclip_kernels").iterdir()
    kept = {key.partition(" of ")[0] for key in json.loads(file.read_text())["tiles"]}
    assert {"forward key"} < kept


def test_empty_caches(tmp_path):
    assert_right(start_at_once(ROOT, tmp_path), built=bool(cpu.levels()))
    if TRITON:
        assert_whole(tmp_path)


def test_poisoned_caches_and_a_broken_build(tmp_path):
    """A file of tiles that is cut off (other rubbish: backends/test_triton_launch.py), and the left-over of a build
    whose linker did not finish."""
    package, cache = tmp_path / "package" / "softclip_kernels", tmp_path / "cache"
    shutil.copytree(ROOT / "softclip_kernels", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (package / f"_cpu{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF" + bytes(100))
    (cache / "softclip_kernels").mkdir(parents=True)
    (cache / "softclip_kernels" / "tiles.json").write_text(CUT_OFF)
    assert_right(start_at_once(package.parent, cache), built=False)
    if TRITON:
        assert_whole(cache)
