"""The curves of one run, and of several together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train import metrics
from train.plot import main, plot

STEPS = 6


def make_run(run: Path, level: float = 0.5, held_out: str = "heldout") -> Path:
    run.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": level, "alpha": level / 2, "r1_image_to_text": level / 4, "r1_text_to_image": level / 8}
        for step in range(STEPS)
    ]
    rows[2]["loss"] = None  # as a number that was not finite is written
    rows.insert(4, {"step": 3, f"{held_out}_r1_image_to_text": level / 16, f"{held_out}_r1_text_to_image": level / 32})
    (run / metrics.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *how, **more: (figures.append(self), save(self, *how, **more)))
    return figures


def ends(axes: Axes) -> list[tuple[str, float, float]]:
    """The colour and the last point of each line."""
    points = ((line.get_color(), np.asarray(line.get_xydata())[-1]) for line in axes.lines)
    return [(str(colour), float(step), float(value)) for colour, (step, value) in points]


def test_one_run_is_drawn_into_its_folder(tmp_path: Path, drawn: list[Figure]) -> None:
    run = make_run(tmp_path / "run")
    assert plot([run]) == run / "curves.png"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    upper, lower, share = figure.axes
    assert ends(upper) == [("tab:blue", 5, 0.5)]
    assert [math.isnan(loss) for loss in upper.lines[0].get_ydata()] == [step == 2 for step in range(STEPS)]
    assert ends(share) == [("tab:orange", 5, 0.25)]
    assert [end[1:] for end in ends(lower)] == [(5, 0.125), (5, 0.0625), (4, 0.03125), (4, 0.015625)]
    assert [str(text.get_text()) for text in lower.get_legend().get_texts()] == [  # type: ignore[union-attr]
        "in batch, image → text",
        "in batch, text → image",
        "heldout, image → text",
        "heldout, text → image",
    ]


def test_several_runs_are_drawn_together_by_their_names(
    tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / "hard", 0.5), make_run(tmp_path / "psd", 0.75, "coco")]
    assert main([*map(str, runs)]) == 0
    assert capsys.readouterr().out == "curves.png\n"
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    assert main([*map(str, runs), "--out", "both.pdf"]) == 0
    assert Path("both.pdf").read_bytes().startswith(b"%PDF")
    figure = drawn[0]
    loss, share, in_batch, held_out = figure.axes
    assert ends(loss) == [("C0", 5, 0.5), ("C1", 5, 0.75)]
    assert ends(share) == [("C0", 5, 0.25), ("C1", 5, 0.375)]
    assert ends(in_batch) == [("C0", 5, 0.125), ("C0", 5, 0.0625), ("C1", 5, 0.1875), ("C1", 5, 0.09375)]
    assert ends(held_out) == [("C0", 4, 0.03125), ("C0", 4, 0.015625), ("C1", 4, 0.046875), ("C1", 4, 0.0234375)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hard", "psd"]
    assert held_out.get_ylabel() == "R@1 on heldout, coco"


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]
    plot(runs, tmp_path / "both.png")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [*map(str, runs)]


def test_what_cannot_be_drawn_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run), str(tmp_path)]) == 2
    assert f"error: {tmp_path}: no metrics.jsonl there; give the folder of a run" in capsys.readouterr().err
    assert main([str(run), "--out", str(tmp_path / "none" / "x.png")]) == 2
    assert f"error: No such file or directory: {tmp_path}/none/x.png" in capsys.readouterr().err
    assert main([str(run), "--out", str(tmp_path / "x.xyz")]) == 2
    assert "error: Format 'xyz' is not supported" in capsys.readouterr().err
