"""What a checkpoint may hold: nothing that is not finite, nothing that runs code, and a word on data, code and
versions. Without processes of its own; see test_job_saving.py for whole jobs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.data import sample, shard_of, tiny
from helpers.saved_runs import FINGERPRINT, Payload, rewrite_manifest, write_checkpoint
from safetensors.torch import load_file, save_file

from train import checkpoint, engine_files, fingerprint
from train.config import Config, load
from train.data import open_training_data
from train.data.shards import write_shard
from train.evaluate import report
from train.evaluate.__main__ import main
from train.options import SKIP_WINDOW, ConfigError
from train.resume import compare
from train.run import NonFiniteError, _check_skipped

CPU = torch.device("cpu")
ENGINE_FILE = engine_files.file_of(1)
TOKENIZER = f"{checkpoint.TOWERS}/tokenizer.json"


def engine(folder: Path) -> None:
    """Files of two ranks."""
    for rank in range(2):
        engine_files.write(folder / engine_files.file_of(rank), engine_content(torch.ones(3)))


def engine_content(moment: torch.Tensor) -> dict[str, Any]:
    part = {
        "name": "a",
        "start": 0,
        "count": len(moment),
        "cut": {"exp_avg": moment},
        "whole": {"step": torch.ones(())},
    }
    return {"format": engine_files.FORMAT, "parts": [part], "groups": [{"lr": 1.0}], "loss_scale": None}


def find(run: Path) -> tuple[str, list[str]]:
    """The checkpoint that training goes on from, and what was said about others."""
    warnings: list[str] = []
    return checkpoint.find(run, warnings.append, engine=True).name, warnings


# --- Only what is finite


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_weights_that_are_not_finite_are_passed_over(
    tmp_path: Path, data: Path, files: dict[str, bytes], value: float
) -> None:
    write_checkpoint(tmp_path, data, files, 4)
    newest = write_checkpoint(tmp_path, data, files, 8)
    tensors = load_file(newest / checkpoint.WEIGHTS)
    tensors["text.norm.bias"][3] = value
    save_file(tensors, newest / checkpoint.WEIGHTS)
    rewrite_manifest(newest)
    warnings: list[str] = []
    assert checkpoint.find(tmp_path, warnings.append).name == "step-000004"
    assert warnings == ["checkpoint step-000008 is not finite (NaN or infinity in text.norm.bias); trying an older one"]


def test_moments_that_are_not_finite_are_passed_over_when_training_goes_on(
    tmp_path: Path, data: Path, files: dict[str, bytes]
) -> None:
    write_checkpoint(tmp_path, data, files, 4, engine=engine)
    newest = write_checkpoint(tmp_path, data, files, 8, engine=engine)
    engine_files.write(newest / checkpoint.ENGINE / ENGINE_FILE, engine_content(torch.tensor([1, torch.inf])))
    rewrite_manifest(newest)
    name, warnings = find(tmp_path)
    assert name == "step-000004"
    assert f"engine/{ENGINE_FILE} holds NaN or infinity" in warnings[0]
    assert checkpoint.find(tmp_path).name == "step-000008", "the weights, which evaluation reads, are good"


def test_skips_are_counted_in_a_row_and_over_a_window() -> None:
    state = checkpoint.State(0, 0, 2, 1)
    for applied in (True, False, False, True, False):
        state = state.after(applied)
    assert (state.step, state.skipped, state.skipped_in_a_row, state.recent_skips) == (5, 3, 1, (1, 2, 4))
    state = replace(state, step=SKIP_WINDOW + 1).after(True)
    assert state.recent_skips == (2, 4), "step 1 lies SKIP_WINDOW steps behind"
    assert state.skipped == 3, "all of them, for the log"


@pytest.mark.parametrize(
    ("options", "state", "message"),
    (
        ({"max_skipped_in_a_row": 3}, {"skipped_in_a_row": 4}, r"number 4 in a row \(job\.max_skipped_in_a_row=3\)"),
        ({"max_skipped_in_a_row": 3}, {"skipped_in_a_row": 3, "skipped": 900}, None),  # of a million steps
        (
            {"max_skipped_share": 0.002},
            {"recent_skips": (5, 7, 9)},
            r"of the last 1000 steps 3 were skipped \(job\.max_skipped_share=0\.002\)",
        ),
        ({"max_skipped_share": 0.003}, {"recent_skips": (5, 7, 9)}, None),
        ({"on_nonfinite": "stop"}, {}, "job.on_nonfinite=stop"),
    ),
)
def test_too_many_skips_end_the_job(
    data: Path, tmp_path: Path, options: dict[str, Any], state: dict[str, Any], message: str | None
) -> None:
    held = SimpleNamespace(
        config=Config.from_dict(tiny(data, **options)),
        state=replace(checkpoint.State(10, 4, 2, 1), **state),
        run=tmp_path,
    )
    if message is None:
        _check_skipped(held, 9)
    else:
        with pytest.raises(NonFiniteError, match=rf"step 9 is not finite, and the job ends: .*{message}"):
            _check_skipped(held, 9)


# --- No code is ever run


def planted(run: Path, name: str, marker: Path, keep_zip: bool = False) -> None:
    """Replace a file of the newest checkpoint by the payload, with a manifest that fits."""
    folder = run / checkpoint.FOLDER / "step-000008"
    if keep_zip:  # in PyTorch's own format, as torch.save writes what it is given
        torch.save({"module": Payload(marker)}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Payload(marker), protocol=2))  # torch.save's own
    rewrite_manifest(folder)


@pytest.mark.parametrize(
    "name", (checkpoint.WEIGHTS, checkpoint.CONFIG, TOKENIZER, checkpoint.STATE, checkpoint.FINGERPRINT)
)
def test_a_payload_in_the_portable_part_is_never_run(
    tmp_path: Path, data: Path, files: dict[str, bytes], name: str
) -> None:
    marker = tmp_path / "was run"
    write_checkpoint(tmp_path, data, files, 8, engine=engine)
    planted(tmp_path, name, marker)
    pickle.loads((tmp_path / checkpoint.FOLDER / "step-000008" / name).read_bytes())
    assert marker.is_dir(), "the payload works"
    marker.rmdir()
    assert main([str(tmp_path)]) == 1
    with pytest.raises(checkpoint.CheckpointError):
        find(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("keep_zip", (True, False), ids=("torch.save", "pickle"))
def test_a_payload_in_the_engine_is_never_run(
    tmp_path: Path, data: Path, files: dict[str, bytes], keep_zip: bool
) -> None:
    marker = tmp_path / "was run"
    write_checkpoint(tmp_path, data, files, 4, engine=engine)
    write_checkpoint(tmp_path, data, files, 8, engine=engine)
    planted(tmp_path, f"{checkpoint.ENGINE}/{ENGINE_FILE}", marker, keep_zip)
    found, warnings = find(tmp_path)
    assert found == "step-000004"
    asked = f"{os.mkdir.__module__}.mkdir"  # posix.mkdir
    assert f"step-000008 cannot be used (UnpicklingError: {ENGINE_FILE} asks for {asked}; only tensors " in warnings[0]
    with pytest.raises(pickle.UnpicklingError):
        engine_files.read(tmp_path / checkpoint.FOLDER / "step-000008" / checkpoint.ENGINE / ENGINE_FILE)
    assert not marker.exists()


# --- Damage of every part and kind


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "null": lambda path: path.write_bytes(b"null"),
    "list": lambda path: path.write_bytes(b"[]"),
    "number": lambda path: path.write_bytes(b"3"),
    "nested list": lambda path: path.write_bytes(b'{"step": [1], "shards": {"a": 1}, "data": {"seed": []}}'),
    "unknown field": lambda path: path.write_bytes(b'{"warp": 9}'),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "deep": lambda path: path.write_bytes(b"[" * 200_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
PARTS = (
    checkpoint.WEIGHTS,
    checkpoint.CONFIG,
    TOKENIZER,
    checkpoint.STATE,
    checkpoint.FINGERPRINT,
    checkpoint.MANIFEST,
    f"{checkpoint.ENGINE}/{ENGINE_FILE}",
)


@pytest.mark.parametrize("part", PARTS)
def test_no_damage_of_any_part_is_a_traceback(tmp_path: Path, data: Path, files: dict[str, bytes], part: str) -> None:
    write_checkpoint(tmp_path / "whole", data, files, 8, engine=engine)
    for how, act in DAMAGES.items():
        run = tmp_path / how
        shutil.copytree(tmp_path / "whole", run)
        folder = run / checkpoint.FOLDER / "step-000008"
        act(folder / part)
        if part != checkpoint.MANIFEST:
            rewrite_manifest(folder)
        if (part, how) == (checkpoint.FINGERPRINT, "gone"):  # as of an earlier version
            assert find(run) == ("step-000008", [])
            continue
        with pytest.raises(checkpoint.CheckpointError, match="no whole checkpoint"):
            find(run)
        if checkpoint.ENGINE not in part:
            assert main([str(run)]) == 1, how


def test_a_checkpoints_folder_that_cannot_be_read_is_no_new_run(tmp_path: Path) -> None:
    assert not checkpoint.has_any(tmp_path)
    (tmp_path / checkpoint.FOLDER).write_text("")
    with pytest.raises(checkpoint.CheckpointError, match="the checkpoints cannot be read: Not a directory: /"):
        checkpoint.has_any(tmp_path)
    assert main([str(tmp_path)]) == 1


@pytest.mark.parametrize("content", (b"", b"\xff", b"step-000099", b"../../step-000004", b"null"))
def test_the_name_of_the_latest_is_a_hint(tmp_path: Path, data: Path, files: dict[str, bytes], content: bytes) -> None:
    write_checkpoint(tmp_path, data, files, 8, engine=engine)
    (tmp_path / checkpoint.FOLDER / checkpoint.LATEST).write_bytes(content)
    assert find(tmp_path) == ("step-000008", [])


def test_a_checkpoint_of_an_earlier_version_loads_and_a_newer_ones_is_named(
    tmp_path: Path, data: Path, files: dict[str, bytes]
) -> None:
    folder = write_checkpoint(tmp_path, data, files, 8, engine=engine)
    (folder / checkpoint.FINGERPRINT).unlink()
    (folder / TOKENIZER).rename(folder / "tokenizer.json")
    (folder / checkpoint.TOWERS).rmdir()
    state = {"step": 8, "skipped": 2, "processes": 2, "zero_stage": 1}
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    options = json.loads((folder / checkpoint.CONFIG).read_text())
    for name in ("keep_every", "max_skipped_in_a_row", "max_skipped_share"):
        options["job"].pop(name)
    options["job"]["max_skipped"] = 10
    options["data"]["folder"], options["data"]["image_size"] = "somewhere", 16
    (folder / checkpoint.CONFIG).write_text(json.dumps(options))
    rewrite_manifest(folder)
    assert find(tmp_path) == ("step-000008", [])
    assert checkpoint.read_state(folder) == checkpoint.State(8, 2, 2, 1, 0, ())
    assert checkpoint.read_config(folder) == Config.from_dict(tiny(data))

    (folder / checkpoint.STATE).write_text(json.dumps({**state, "moon": 1}))
    with pytest.raises(checkpoint.CheckpointError, match=r"holds moon, which this version does not know: a newer one"):
        checkpoint.read_state(folder)
    (folder / checkpoint.STATE).write_text(json.dumps({**state, "step": -1}))
    with pytest.raises(checkpoint.CheckpointError, match="gives step as -1, and a whole number from 0 to"):
        checkpoint.read_state(folder)


def test_an_option_of_an_earlier_version_is_named_with_those_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("job:\n  max_skipped: 3\n")
    with pytest.raises(ConfigError, match=r"give job\.max_skipped_in_a_row and job\.max_skipped_share instead"):
        load(tmp_path / "old.yaml")


@pytest.mark.parametrize(
    "text", (b"\xff\xfe", b"a: 0000-99-99", b"[" * 5000, b'data: {source: "a\\0b"}', b"job: {seed: 1e30}")
)
def test_a_damaged_configuration_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(ConfigError):
        load(tmp_path / "run.yaml")


# --- Other options, data and software


def changed(data: Path, section: str, **options: Any) -> Config:
    sections = tiny(data)
    sections[section] = {**sections[section], **options}
    return Config.from_dict(sections)


def test_a_run_goes_on_only_with_the_options_and_data_it_began_with(
    tmp_path: Path, data: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path, data, files, 8)
    same = Config.from_dict(tiny(data))
    compare(same, folder, FINGERPRINT)
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"optimizer\.lr=0\.0015 then, 0\.01 now.*set them back in .*config\.yaml"):
        compare(changed(data, "optimizer", lr=0.01, steps=99), folder, FINGERPRINT)
    compare(changed(data, "job", processes=2), folder, FINGERPRINT)
    assert capsys.readouterr().out == "", "0 stood for the two that were started"
    compare(changed(data, "optimizer", steps=99), folder, FINGERPRINT)
    assert "with other options than step-000008 was written with: optimizer.steps=12 then, 99 now" in (
        capsys.readouterr().out
    )
    with pytest.raises(
        checkpoint.CheckpointError, match=r"other data \(fingerprint data then, d2 now\); let data\.source"
    ):
        compare(same, folder, replace(FINGERPRINT, data="d2"))
    compare(same, folder, replace(FINGERPRINT, code="c2", versions={"torch": "2", "numpy": "3"}))
    assert capsys.readouterr().out == (
        "step-000008 was written by other software, and may not go on bit for bit: code code, now c2; "
        "numpy unknown, now 3; torch 1, now 2\n"
    )
    (folder / checkpoint.FINGERPRINT).unlink()
    compare(same, folder, FINGERPRINT)
    assert capsys.readouterr().out.startswith("step-000008 holds no fingerprint.json")


def test_a_fingerprint_is_of_the_data_and_not_of_their_place(data: Path, tmp_path: Path) -> None:
    def of_data(folder: Path) -> str:
        return open_training_data(Config.from_dict(tiny(folder))).fingerprint

    taken = fingerprint.take(of_data(data), {"heldout": "h"}, CPU)
    shutil.copytree(data, tmp_path / "copy")
    assert of_data(tmp_path / "copy") == taken.data
    assert {"python", "torch", "deepspeed", "numpy", "softclip_kernels", "platform"} <= taken.versions.keys()
    assert fingerprint.Fingerprint.from_json(taken.to_json()) == taken
    changed = [sample("train", concept, "other") for concept in range(20)]
    write_shard(shard_of(tmp_path / "copy", "train"), changed)
    assert of_data(tmp_path / "copy") != taken.data


def test_a_fingerprint_knows_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "train"
    shutil.copytree(Path(fingerprint.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "__file__", str(package / "fingerprint.py"))
    same = fingerprint.of_code()
    monkeypatch.undo()
    assert fingerprint.of_code() == same, "not of the folder, nor of compiled Python"
    monkeypatch.setattr(fingerprint, "__file__", str(package / "fingerprint.py"))
    with (package / "data" / "sampler.py").open("a") as file:
        file.write("\n")
    assert fingerprint.of_code() != same


def test_evaluation_warns_of_other_data_and_of_what_it_cannot_write(
    tmp_path: Path, data: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, data, files, 8)
    assert main([str(tmp_path)]) == 0
    assert (
        "warning: heldout holds other data than when step-000008 was written (fingerprint " in capsys.readouterr().err
    )
    (tmp_path / report.TABLE).unlink()
    (tmp_path / report.TABLE).mkdir()
    assert main([str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "| heldout | 40 | 40 |" in said.out, "what cannot be written is said"
    assert f"error: Is a directory: {tmp_path / report.TABLE}\n" in said.err
