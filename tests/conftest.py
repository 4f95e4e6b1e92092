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
def pairs(data: Path) -> Any:
    """The training pairs in `data`."""
    from train.data import load_pairs

    return load_pairs(data, "train")


@pytest.fixture(scope="module")
def tokenizer(pairs: Any) -> Any:
    """The trainer's, of the training captions."""
    from train.data import all_captions
    from train.tokenizer import train_tokenizer

    return train_tokenizer(all_captions(pairs), 300)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that small problems have inner, edge and corner blocks."""
    monkeypatch.setitem(chunked.BLOCK, "cpu", 48)
