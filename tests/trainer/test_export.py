"""Exports that need no library but the trainer's own: safetensors, what is refused, and that nothing half is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.exports import write_run
from PIL import Image
from safetensors.torch import load_file

from train import checkpoint, export
from train.export.__main__ import main
from train.options import ModelOptions
from train.towers import Bundle, small

SMALL = ModelOptions(
    image_size=16, embed_dim=16, image_widths=(8, 16), text_width=24, text_layers=1, text_heads=2, vocab_size=300
)
PICTURES = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 4), dtype=np.uint8), "RGBA")] * 2
CAPTIONS = ["thing 3", "a drawing of thing 17"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_run(run, SMALL, step=3)
    return write_run(run, SMALL, step=5)


def rows(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        x, y, _ = bundle.module(bundle.prepare(PICTURES, None), bundle.tokenize(CAPTIONS))
    return x, y


def made_by_a_factory(options: ModelOptions) -> Bundle:
    """Anyone's towers, as model.towers=python: names them; their tokenizer is always the same."""
    return small.build(options, lambda: CAPTIONS, None)


def test_safetensors_give_the_same_towers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "exported"
    assert main([str(run), "--to", "safetensors", "--out", str(out)]) == 0
    assert f'read_bundle(Path("{out}"))' in capsys.readouterr().out
    ours = checkpoint.read_bundle(run / checkpoint.FOLDER / "step-000005")
    theirs = checkpoint.read_bundle(out)
    assert all(torch.equal(a, b) for a, b in zip(rows(ours), rows(theirs), strict=True))
    assert load_file(out / "model.safetensors").keys() == ours.module.state_dict().keys()
    assert checkpoint.read_state(out).step == 5
    assert not (out / checkpoint.ENGINE).exists()
    assert [path.name for path in out.parent.iterdir()] == ["exported"], "no scratch folder"


def test_a_checkpoint_is_chosen_by_its_step(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run), "--to", "safetensors", "--out", str(tmp_path / "third"), "--checkpoint"]
    assert main([*arguments, "3"]) == 0
    assert checkpoint.read_state(tmp_path / "third").step == 3
    capsys.readouterr()
    assert main([*arguments, "4"]) == 1
    assert "holds no checkpoint step-000004 (found: step-000005, step-000003)" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", SMALL)
    weights = run / checkpoint.FOLDER / "step-000003" / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4])
    for choice in ([], ["--checkpoint", "3"]):
        assert main([str(run), "--to", "safetensors", "--out", str(tmp_path / "out"), *choice]) == 1
        assert "step-000003" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_towers_of_anyones_are_exported(tmp_path: Path) -> None:
    towers = f"python:{__name__}:{made_by_a_factory.__name__}"
    run = write_run(tmp_path / "run", replace(SMALL, towers=towers))
    out = tmp_path / "out"
    assert main([str(run), "--to", "safetensors", "--out", str(out)]) == 0
    expected = rows(checkpoint.read_bundle(run / checkpoint.FOLDER / "step-000003"))
    assert all(torch.equal(a, b) for a, b in zip(expected, rows(checkpoint.read_bundle(out)), strict=True))


def test_an_export_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take minutes, for three pictures."""
    folder = checkpoint.find(write_run(tmp_path / "run", replace(SMALL, compile=True)))
    assert "encode_images" in vars(checkpoint.read_bundle(folder).module), "compiled"
    monkeypatch.delattr(torch, "compile")
    export.export(folder, "safetensors", tmp_path / "out")


@pytest.mark.parametrize("form", ("open_clip", "hf"))
def test_a_form_that_cannot_hold_the_towers_is_refused(
    run: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--to", form, "--out", str(tmp_path / "out")]) == 1
    words = f"--to {form} cannot hold model.towers=small; allowed for these: safetensors, onnx"
    assert words in capsys.readouterr().err


def test_a_folder_that_holds_something_stays_as_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run), "--to", "safetensors", "--out"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        assert main([*arguments, str(tmp_path / name)]) == 1
        assert f"--out {tmp_path / name} is there, and is no empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert main([*arguments, str(tmp_path / "empty")]) == 0
    assert checkpoint.read_state(tmp_path / "empty").step == 5


def wrong_weight(folder: Path, bundle: Bundle, out: Path) -> None:
    export.portable.write(folder, bundle, out)
    with torch.no_grad():  # what was written was right, so to say, and the towers are others
        bundle.module.get_parameter("text.project.weight")[0, 0] += 1e-2


def no_configuration(folder: Path, bundle: Bundle, out: Path) -> None:
    export.portable.write(folder, bundle, out)
    (out / checkpoint.CONFIG).unlink()


def full_disk(folder: Path, bundle: Bundle, out: Path) -> None:
    export.portable.write(folder, bundle, out)
    raise OSError(28, "No space left on device", str(out / checkpoint.WEIGHTS))


def not_traceable(folder: Path, bundle: Bundle, out: Path) -> None:
    export.portable.write(folder, bundle, out)
    raise RuntimeError("no graph\n" + 1000 * "of this ")


@pytest.mark.parametrize(
    ("write", "words"),
    (
        (wrong_weight, "the text tower's rows are"),
        (no_configuration, "its own library does not load what was written (FileNotFoundError"),
        (full_disk, "No space left on device"),
        (not_traceable, "--to safetensors cannot write model.towers=small (RuntimeError: no graph of this"),
    ),
)
def test_what_goes_wrong_leaves_nothing(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: Callable[..., Any],
    words: str,
) -> None:
    monkeypatch.setitem(export.FORMS, "safetensors", replace(export.FORMS["safetensors"], write=write))
    assert main([str(run), "--to", "safetensors", "--out", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named_with_its_extra(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(__import__("sys").modules, name, json)
    assert main([str(run), "--to", "onnx", "--out", str(tmp_path / "out")]) == 1
    words = capsys.readouterr().err
    assert "--to onnx needs the library onnxscript" in words and "pip install 'softclip-kernels[onnx]'" in words
    assert list(tmp_path.iterdir()) == []
