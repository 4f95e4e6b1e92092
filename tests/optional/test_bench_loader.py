"""`python -m bench loader` at a size that takes no time."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import loader, records

pytest.importorskip("open_clip")
pytest.importorskip("webdataset")

RECORDS, BATCH = 16, 4


@pytest.fixture(scope="module")
def libraries() -> tuple[Any, Any]:
    return loader.libraries()


@pytest.fixture
def setting(libraries: tuple[Any, Any], tmp_path: Path) -> loader.Setting:
    loader.write_shards(tmp_path, RECORDS, 40)
    bundle, _ = libraries
    return loader.Setting(tmp_path, RECORDS, BATCH, bundle.prepare, bundle.tokenize)


def test_both_loaders_are_measured_by_turns(
    libraries: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(loader, "libraries", lambda: libraries)
    loader.main(["--pixels", "40", "--workers", "0", "1", "--batch", "4", "--steps", "4", "--rounds", "2"])
    (path,) = (tmp_path / "loader").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    pairs = [(row["workers"], row["loader"]) for row in rows if row["table"] == "loaders"]
    assert pairs == [(0, "ours"), (0, "open_clip"), (1, "ours"), (1, "open_clip")]
    assert len([row for row in rows if row["table"] == "parts"]) == 5
    for row in rows[5:]:
        assert len(row["rates"]) == 2 and min(row["rates"]) > 0 and min(row["cpu"]) > 0
        assert (row["peak MB"] > 0) == (row["workers"] > 0)


def test_both_read_as_many_pairs(libraries: tuple[Any, Any], setting: loader.Setting) -> None:
    for batches in (loader.our_batches(setting, 1), loader.their_batches(libraries[1], setting, 1)):
        assert list(batches) == [BATCH] * (RECORDS // BATCH)


def test_loaders_that_give_other_pixels_are_not_timed(libraries: tuple[Any, Any], setting: loader.Setting) -> None:
    theirs = libraries[1]
    loader.check(theirs, setting)

    class Other:
        evaluation = setting.prepare.evaluation

        def __call__(self, *given: Any) -> torch.Tensor:
            return setting.prepare(*given) + 1e-6

    with pytest.raises(SystemExit, match="other pixels"):
        loader.check(theirs, replace(setting, prepare=Other()))


def test_without_open_clip_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip_train", None)
    with pytest.raises(SystemExit, match=r"softclip-kernels\[open_clip\]"):
        loader.libraries()
