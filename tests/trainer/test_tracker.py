"""Rows that go to an experiment tracker as well. The libraries are stand-ins here, which note how they are called."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from train import metrics, tracker
from train.config import Config


class Library(ModuleType):
    """Notes its calls; `broken` names the one that raises."""

    def __init__(self, name: str, broken: str = "") -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin=__file__)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.broken = broken
        self.Settings = lambda **options: options
        self.init = lambda **options: (
            self._note("init", options)
            or SimpleNamespace(
                define_metric=lambda *names, **options: self._note("define_metric", options),
                log=lambda values, **options: self._note("log", {"values": values, **options}),
                finish=lambda: self._note("finish", {}),
            )
        )

    def _note(self, call: str, options: dict[str, Any]) -> None:
        self.calls.append((call, options))
        if call == self.broken:
            raise ConnectionError("no route to host")


def logged(name: str, broken: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """What became of a short run that reports there."""
    library = Library(name, broken)
    monkeypatch.setitem(sys.modules, name, library)
    log = metrics.Log(run, 0, 10, Config.from_dict({"job": {"report": name, "seed": 7}}))
    log.step(0, {"loss": 2.0, "alpha": 0.0})
    log.step(1, {"loss": math.nan, "alpha": 0.5})
    log.close()
    return library


def test_wandb_gets_the_configuration_and_the_rows_and_stays_offline_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    calls = logged("wandb", "", tmp_path, monkeypatch).calls
    assert [name for name, _ in calls] == ["init", "define_metric", "log", "log", "finish"]
    begun = calls[0][1]
    assert (begun["mode"], begun["resume"], begun["project"], begun["name"]) == (
        "offline", None, "softclip", tmp_path.name
    )  # fmt: skip
    assert begun["config"]["job"]["seed"] == 7
    assert json.dumps(begun["config"]) and begun["dir"] == str(tmp_path)
    assert calls[2:4] == [
        ("log", {"values": {"step": 0, "loss": 2.0, "alpha": 0.0}}),
        ("log", {"values": {"step": 1, "alpha": 0.5}}),
    ]
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    again = logged("wandb", "", tmp_path, monkeypatch).calls[0][1]
    assert (again["mode"], again["resume"], again["project"]) == ("online", "allow", "mine")
    assert again["id"] == begun["id"], "a run that goes on is the same one there"


def test_trackio_gets_the_configuration_and_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = logged("trackio", "", tmp_path, monkeypatch).calls
    assert [name for name, _ in calls] == ["init", "log", "log", "finish"]
    begun = calls[0][1]
    assert (begun["project"], begun["resume"], begun["config"]["job"]["seed"]) == ("softclip", "allow", 7)
    assert begun["name"].startswith(f"{tmp_path.name}-") and "space_id" not in begun
    assert calls[1:3] == [
        ("log", {"values": {"loss": 2.0, "alpha": 0.0}, "step": 0}),
        ("log", {"values": {"alpha": 0.5}, "step": 1}),
    ]


@pytest.mark.parametrize("library", ("wandb", "trackio"))
@pytest.mark.parametrize(("broken", "calls"), (("init", 1), ("log", 2), ("finish", 4)))
def test_a_tracker_that_fails_ends_no_run_and_is_not_asked_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    library: str,
    broken: str,
    calls: int,
) -> None:
    made = logged(library, broken, tmp_path, monkeypatch).calls
    assert len([name for name, _ in made if name != "define_metric"]) == calls
    said = f"warning: {library} failed (ConnectionError: no route to host); the run goes on without it"
    assert capsys.readouterr().out.count(said) == 1
    assert [row["step"] for row in metrics.read_rows(tmp_path / metrics.METRICS)] == [0, 1]


def test_only_a_library_counts_as_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside" / "trackio_of_a_run").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "beside")
    assert not tracker.is_installed("trackio_of_a_run"), "a folder that a tracker left where it ran"
    assert not tracker.is_installed("no_such_library")
    assert tracker.is_installed("json")
