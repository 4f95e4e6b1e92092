"""Effective robustness, and the results of evaluations that it is computed from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from train.data import DataError
from train.evaluate.results import read_results
from train.evaluate.robustness import Point, fit, main

ROOT = 13.5 ** (1 / 3)
REFERENCES = [(0.2, 0.1), (0.5, 0.4), (0.8, 0.5)]
# Their logits are -log 4, 0, log 4 and -log 9, -log 1.5, 0. So the slope is (log 9) / (2 log 4) = log 3 / log 4, the
# intercept is the mean of the latter, -log(13.5) / 3, and the odds on the line are 3^-1, 1 and 3 times 13.5^(-1/3).
EXPECTED = [1 / (1 + 3 * ROOT), 1 / (1 + ROOT), 3 / (3 + ROOT)]


def write(file: Path, standard: float | None, shifted: float | None, metric: str = "acc1") -> Path:
    """An evaluation.json of two sets."""
    entries = [
        {"dataset": name, "task": "zeroshot_classification", "metrics": {metric: accuracy}}
        for name, accuracy in (("heldout", standard), ("vendor", shifted))
    ]
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"checkpoint": "step-000420", "results": entries}))
    return file


@pytest.fixture
def references(tmp_path: Path) -> list[str]:
    return [str(write(tmp_path / f"{number}.json", *given)) for number, given in enumerate(REFERENCES)]


def asked(references: list[str], *models: Path) -> list[str]:
    sets = ("--in", "heldout", "--shift", "vendor")
    return [*sets, "--reference", *references, "--models", *map(str, models)]


def test_residuals_equal_a_calculation_by_hand() -> None:
    line = fit([Point(str(given), *given) for given in REFERENCES])
    assert line.slope == pytest.approx(np.log(3) / np.log(4), rel=1e-12)
    assert line.intercept == pytest.approx(-np.log(13.5) / 3, rel=1e-12)
    for (standard, _), expected in zip(REFERENCES, EXPECTED, strict=True):
        assert line.expected(standard) == pytest.approx(expected, rel=1e-12)
        assert line.robustness(Point("", standard, 0.6)) == pytest.approx(60 - 100 * expected, rel=1e-12)


def test_the_line_of_least_squares_is_numpys() -> None:
    generator = np.random.default_rng(0)
    shares = generator.uniform(0.05, 0.95, (8, 2))
    line = fit([Point("", *map(float, row)) for row in shares])
    x, y = np.log(shares / (1 - shares)).T
    np.testing.assert_allclose([line.slope, line.intercept], np.polyfit(x, y, 1), rtol=1e-9)


def test_the_command_prints_the_line_and_all_models(
    tmp_path: Path, references: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "run" / "evaluation.json", 0.8, 0.6).parent
    nothing = write(tmp_path / "nothing.json", 0.5, 0.0)  # which has no logit, but a residual
    assert main(asked(references, run, nothing)) == 0
    residuals = [100 * (shifted - want) for (_, shifted), want in zip(REFERENCES, EXPECTED, strict=True)]
    lines = [
        "acc1 in percent. 3 reference models give logit(vendor) = 0.792 · logit(heldout) -0.868, and lie "
        f"{np.sqrt(np.square(residuals).sum()):.2f} points around it (residual standard error).",
        "",
        "| model | heldout | vendor | expected | effective robustness |",
        "| --- | --: | --: | --: | --: |",
        f"| {run} | 80.00 | 60.00 | 55.75 | +4.25 |",
        f"| {nothing} | 50.00 | 0.00 | 29.58 | -29.58 |",
        f"| {references[0]} (reference) | 20.00 | 10.00 | 12.28 | {residuals[0]:+.2f} |",
        f"| {references[1]} (reference) | 50.00 | 40.00 | 29.58 | {residuals[1]:+.2f} |",
        f"| {references[2]} (reference) | 80.00 | 50.00 | 55.75 | {residuals[2]:+.2f} |",
    ]
    assert capsys.readouterr().out.splitlines() == lines


def test_the_plot_shows_the_line_and_each_model(
    tmp_path: Path, references: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *how, **more: (figures.append(self), save(self, *how, **more)))
    models = [write(tmp_path / f"{name}.json", *given) for name, given in {"a": (0.8, 0.6), "b": (0.5, 0.0)}.items()]
    file = tmp_path / "shift.png"
    assert main([*asked(references, *models), "--plot", str(file)]) == 0
    assert capsys.readouterr().out.endswith(f"\n{file}\n")
    assert file.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("logit", "logit")
    fitted, equal, known, first, second = [np.asarray(line.get_xydata()) for line in axes.lines]
    np.testing.assert_allclose(np.interp([0.5, 0.8], *fitted.T), EXPECTED[1:], atol=1e-3)
    np.testing.assert_array_equal(*equal.T)
    np.testing.assert_array_equal(known, REFERENCES)
    np.testing.assert_array_equal(first, [(0.8, 0.6)])
    np.testing.assert_array_equal(second, [(0.5, axes.get_ylim()[0])])  # at the edge
    legend = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert legend[-2:] == [f"{models[0]} (+4.2)", f"{models[1]} (-29.6)"]


def test_another_metric_can_be_asked_for(
    tmp_path: Path, references: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    metric = "text_retrieval_recall@1"
    files = [
        str(write(tmp_path / f"other{number}.json", given[0] / 2, given[1], metric))
        for number, given in enumerate(REFERENCES)
    ]
    assert main([*asked(files, Path(files[0])), "--metric", metric]) == 0
    assert capsys.readouterr().out.startswith(f"{metric} in percent. 3 reference models ")
    assert main([*asked(references, Path(references[0])), "--metric", metric]) == 2
    assert f"error: {references[0]} has no --metric {metric} of heldout; allowed: acc1" in capsys.readouterr().err


def test_what_gives_no_line_is_refused(
    tmp_path: Path, references: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*accuracies: tuple[float, float]) -> str:
        files = [str(write(tmp_path / f"r{number}.json", *given)) for number, given in enumerate(accuracies)]
        assert main(asked(files, Path(references[1]))) == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err.replace(str(tmp_path), "")

    assert refusal((0.2, 0.1), (0.5, 0.4)) == (
        "error: 2 reference models; allowed: 3 or more, for a line has two parameters\n"
    )
    assert "error: all 3 reference models have accuracy 0.5 without a shift, which" in refusal(*[(0.5, 0.2)] * 3)
    no_logit = "which has no logit; leave that model out, or use larger sets\n"
    assert refusal((0.2, 0.1), (0.5, 0.4), (0.8, 1.0)) == f"error: /r2.json has accuracy 1.0, {no_logit}"
    assert refusal((0.2, 0.1), (0.0, 0.4), (0.8, 0.9)) == f"error: /r1.json has accuracy 0.0, {no_logit}"
    assert refusal((0.2, 0.1), (40, 0.4), (0.8, 0.9)) == (
        "error: /r1.json: acc1 of heldout is 40.0; allowed: a share of 1, as accuracies are\n"
    )


def test_what_cannot_be_read_or_drawn_is_named(
    tmp_path: Path, references: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    good = Path(references[0])
    assert main([*asked(references, good), "--shift", "coco"]) == 2
    assert f"{good} has no results of the set 'coco'; allowed: heldout, vendor" in capsys.readouterr().err
    assert main([*asked(references, good), "--plot", str(tmp_path / "x.xyz")]) == 2
    assert "error: Format 'xyz' is not supported" in capsys.readouterr().err
    assert main([*asked(references, good), "--plot", str(tmp_path / "none" / "x.png")]) == 2
    assert f"error: No such file or directory: {tmp_path}/none/x.png" in capsys.readouterr().err
    assert main(asked(references, tmp_path)) == 2
    assert f"error: {tmp_path}: no evaluation.json there; give a run that was evaluated" in capsys.readouterr().err


def test_results_of_all_tasks_are_read_by_set(tmp_path: Path) -> None:
    entries = [
        {"dataset": "a", "task": "zeroshot_classification", "metrics": {"acc1": 0.5, "acc5": None, "n": 3}},
        {"dataset": "a", "task": "linear_probe", "metrics": {"lp_acc1": 0.75, "converged": True}},
        {"dataset": "b", "task": "zeroshot_retrieval", "metrics": {"image_retrieval_recall@5": 1}},
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": entries}))
    found = {"a": {"acc1": 0.5, "n": 3.0, "lp_acc1": 0.75}, "b": {"image_retrieval_recall@5": 1.0}}
    assert read_results(tmp_path) == read_results(tmp_path / "evaluation.json") == found


def test_a_file_of_clip_benchmarks_is_read(tmp_path: Path) -> None:
    file = tmp_path / "benchmark_cifar10.json"
    metrics = {"acc1": 0.9, "acc5": 0.99, "mean_per_class_recall": 0.9}
    file.write_text(json.dumps({"dataset": "cifar10", "model": "ViT-B-32", "task": "x", "metrics": metrics}))
    assert read_results(file) == {"cifar10": metrics}


@pytest.mark.parametrize(
    "content", ("", "[]", "{}", '{"sets": {}}', '{"results": 3}', '{"results": [{"dataset": "a", "metrics": 3}]}')
)
def test_what_holds_no_results_is_named(tmp_path: Path, content: Any) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/evaluation.json holds no results, each with")):
        read_results(tmp_path)
