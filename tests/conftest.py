"""Shared by all tests: every backend, the trainer's data, and how the suite runs on small machines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.backends import CPU_LEVELS, FLOAT64_BACKENDS
from helpers.ranks import Pool

from softclip_kernels.backends import chunked, cpu


@pytest.fixture(params=(*FLOAT64_BACKENDS, *CPU_LEVELS))
def backend(request, monkeypatch):
    """Every backend; the one of C++ kernels at every instruction-set level of this machine."""
    name, _, level = request.param.partition(" ")
    if level:
        monkeypatch.setenv(cpu.ISA_VARIABLE, level)
    return name


@pytest.fixture(scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """Ranks that start once and serve all tests of a module, as many as its RANKS says."""
    pool = Pool(request.module.RANKS)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set for the trainer."""
    from helpers.data import make_data  # the library's own tests run without what the trainer needs

    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def training(data: Path) -> Any:
    """What the trainer makes of `data`."""
    from helpers.data import tiny

    from train.config import Config
    from train.data import open_training_data

    return open_training_data(Config.from_dict(tiny(data)))


@pytest.fixture(scope="module")
def files(data: Path, training: Any) -> Any:
    """What small towers for `data` are built from: their tokenizer."""
    from helpers.data import tiny

    from train import towers
    from train.config import Config

    return towers.build(Config.from_dict(tiny(data)).model, training.captions).files


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that small problems have inner, edge and corner blocks."""
    monkeypatch.setitem(chunked.BLOCK, "cpu", 48)
