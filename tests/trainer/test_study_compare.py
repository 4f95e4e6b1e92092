"""What `compare` makes of finished runs: differences, intervals, tables and pictures, against hand calculations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from train.data import DataError
from train.evaluate.records import RECORDS, Hits, read_records, write_records
from train.study import intervals
from train.study.compare import main
from train.study.comparison import choose_metrics, compare, read_runs
from train.study.finished import STUDY_FILE, folder_in, read_lines, write_lines

METRIC = "text_retrieval_recall@1"
# By method and seed, as shares of two sets; `psd` lacks the last seed.
FIGURES = {
    "hard": {1: (0.50, 0.30), 2: (0.52, 0.26), 3: (0.48, 0.34)},
    "psd": {1: (0.53, 0.31), 2: (0.54, 0.28)},
    "soft": {1: (0.50, 0.20), 2: (0.52, 0.16), 3: (0.49, 0.24)},
}


def line(condition: str, method: str, seed: int, metrics: dict[str, dict[str, Any]], code: str = "a") -> dict[str, Any]:
    name = "/".join(filter(None, (condition, method, f"seed-{seed}")))
    results = [{"dataset": of, "task": "zeroshot_retrieval", "metrics": values} for of, values in metrics.items()]
    return {
        "run": name,
        "condition": condition,
        "method": method,
        "seed": seed,
        "commit": "0123456789ab",
        "fingerprint": {"code": code},
        "results": {"results": results},
    }


def write_study(folder: Path, lines: list[dict[str, Any]], **given: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_lines(folder, {one["run"]: one for one in lines})
    runs: dict[str, Any] = {one["method"]: {} for one in lines}
    (folder / STUDY_FILE).write_text(yaml.safe_dump({"runs": runs, **given}, sort_keys=False))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    lines = [
        line("", method, seed, {"heldout": {METRIC: first, "acc5": None}, "vendor": {METRIC: second}})
        for method, seeds in FIGURES.items()
        for seed, (first, second) in seeds.items()
    ]
    return write_study(tmp_path / "study", lines, reference="hard", primary=f"macro/{METRIC}")


def hits(labels: list[int], found: list[float]) -> Hits:
    return Hits(np.array(labels), np.array(found))


def run_main(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_differences_are_taken_at_the_same_seed(study: Path) -> None:
    runs = read_runs(study, read_lines(study), {})
    metrics = choose_metrics(runs, [f"*/{METRIC}"], f"macro/{METRIC}")
    assert metrics == [f"macro/{METRIC}", f"heldout/{METRIC}", f"vendor/{METRIC}"]
    made = {(one.metric.partition("/")[0], one.method): one for one in compare(runs, "hard", metrics, metrics[0], {})}
    assert made["heldout", "hard"].differences == {} and made["heldout", "hard"].p is None
    psd, soft = made["heldout", "psd"], made["macro", "soft"]
    assert psd.values == {1: 0.53, 2: 0.54} and psd.differences == pytest.approx({1: 0.03, 2: 0.02})
    assert psd.difference == pytest.approx(0.025)
    assert psd.interval is not None  # of two seeds: 12.7062 standard errors
    assert (psd.interval.low, psd.interval.high) == pytest.approx((0.025 - 0.0635310, 0.025 + 0.0635310), abs=1e-6)
    assert soft.differences == pytest.approx({1: -0.05, 2: -0.05, 3: -0.045})


def test_the_primary_metric_is_a_family_of_its_own(study: Path) -> None:
    runs = read_runs(study, read_lines(study), {})
    metrics = choose_metrics(runs, ["*"], f"macro/{METRIC}")
    made = compare(runs, "hard", metrics, metrics[0], {})
    for primary, count in ((True, 2), (False, 4)):
        family = [one for one in made if (one.metric == metrics[0]) == primary and one.differences]
        plain = [intervals.t_interval(list(one.differences.values())) for one in family]
        assert len(family) == count
        assert [one.p for one in family] == intervals.holm([one.p for one in plain if one is not None])


def test_records_widen_an_interval_that_seeds_alone_make_too_narrow(study: Path) -> None:
    """All seeds agree on a difference that rests on one concept of four."""
    labels = [0, 0, 1, 1, 2, 2, 3, 3]
    found = {"hard": [1.0, 0, 0, 0, 1, 1, 1, 0], "soft": [1.0, 0, 0, 0, 1, 1, 0, 0]}
    lines = []
    for method, some in found.items():
        for seed in (1, 2, 3):
            lines.append(line("", method, seed, {"heldout": {METRIC: float(np.mean(some))}}))
            folder = folder_in(study, lines[-1]["run"])
            folder.mkdir(parents=True, exist_ok=True)
            write_records(folder, {f"heldout/{METRIC}": hits(labels, some)})
    write_study(study, lines)
    runs = read_runs(study, read_lines(study), {})
    (_, soft) = compare(runs, "hard", [f"heldout/{METRIC}"], None, {})
    assert soft.difference == pytest.approx(-1 / 8) and soft.interval is not None
    # A draw of four takes the fourth concept k times, for a difference of -k / 8: never with (3/4)^4 = 32 %.
    assert (soft.interval.low, soft.interval.high) == (-3 / 8, 0.0)
    assert soft.interval.method == intervals.OVER_BOTH and soft.interval.holds_zero
    assert soft.p == pytest.approx(2 * 0.75**4, abs=0.03)  # the larger one: Student's is 0, of equal differences
    (folder_in(study, lines[-1]["run"]) / RECORDS).unlink()  # with one run's missing, seeds alone are left
    (_, alone) = compare(read_runs(study, read_lines(study), {}), "hard", [f"heldout/{METRIC}"], None, {})
    assert alone.interval is not None and alone.interval.method == intervals.OVER_SEEDS


def test_a_mean_over_sets_is_drawn_only_where_every_set_has_records(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare_with_records_of(*sets: str) -> None:
        for method in ("hard", "psd"):
            for seed in (1, 2):
                folder = folder_in(study, f"{method}/seed-{seed}")
                folder.mkdir(parents=True, exist_ok=True)
                values = dict(zip(("heldout", "vendor"), FIGURES[method][seed], strict=True))
                write_records(folder, {f"{name}/{METRIC}": hits([0, 1], [0, 2 * values[name]]) for name in sets})
        compare(read_runs(study, read_lines(study), {}), "hard", [f"macro/{METRIC}"], None, {})

    drawn: list[tuple[int, ...]] = []
    draw_means = intervals.draw_means

    def watch(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        drawn.append(sums.shape)
        return draw_means(sums, counts)

    monkeypatch.setattr(intervals, "draw_means", watch)
    compare_with_records_of("heldout")
    assert drawn == []
    compare_with_records_of("heldout", "vendor")
    assert drawn == [(4, 2, 2)]  # two methods' two sets, two seeds, two concepts


def test_a_mean_of_the_studys_own_is_a_metric_like_others(study: Path) -> None:
    means = {"both": ["heldout/*", "*"]}
    for method in ("hard", "psd"):
        for seed in (1, 2):
            folder = folder_in(study, f"{method}/seed-{seed}")
            folder.mkdir(parents=True, exist_ok=True)
            values = dict(zip(("heldout", "vendor"), FIGURES[method][seed], strict=True))
            write_records(folder, {f"{name}/{METRIC}": hits([0, 1], [0, 2 * value]) for name, value in values.items()})
    runs = read_runs(study, read_lines(study), means)
    metrics = choose_metrics(runs, None, "mean/both")
    assert metrics[0] == "mean/both"
    own, macro = (compare(runs, "hard", [metric], None, means) for metric in ("mean/both", f"macro/{METRIC}"))
    for one, same in zip(own, macro, strict=True):
        assert (one.values, one.differences, one.interval) == (same.values, same.differences, same.interval)
    assert "mean/none" not in choose_metrics(read_runs(study, read_lines(study), {"none": ["nowhere/*"]}), ["*"], None)


def test_the_tables_say_what_is_shown_and_what_they_lack(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = run_main(capsys, study, "--markdown", study / "table.md")
    assert status == 0 and (study / "table.md").read_text() == said
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in said.splitlines() if row.startswith("| ")]
    found = {(row[0], row[1]): row[2:] for row in rows}
    assert found[f"**macro/{METRIC}**", "hard"] == ["3", "40.0 ± 1.0", "–", "–", "–", "–", ""]
    assert found[f"heldout/{METRIC}", "psd"] == [
        "2", "53.5 ± 0.7", "+2.5", "[-3.9, +8.9]", intervals.OVER_SEEDS, "0.377", "not shown",
    ]  # fmt: skip
    assert found[f"vendor/{METRIC}", "soft"][2:4] == ["-10.0", "[-10.0, -10.0]"]
    assert found[f"vendor/{METRIC}", "soft"][-1] == "lower"
    assert "8 of 8 runs have no results by record, and differences to or from these have the t interval" in said
    assert "Commit: 0123456789ab." in said


def test_conditions_have_a_table_each_in_the_order_of_the_file(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = (("clean", "old", 0.1), ("noisy", "psd", 0.2), ("clean", "psd", 0.6), ("clean", "hard", 0.5))
    lines = [
        line(condition, method, seed, {"heldout": {METRIC: value + seed / 100}}, code=method)
        for condition, method, value in cases
        for seed in (2, 1)
    ]
    write_study(study, lines, conditions={"clean": {}, "noisy": {}}, runs={"hard": {}, "psd": {}}, reference="hard")
    status, said, _ = run_main(capsys, study)
    titles = [row for row in said.splitlines() if row.startswith(("## ", f"| heldout/{METRIC}"))]
    starts = [title.partition(" | ")[2].partition(" | ")[0] or title for title in titles]
    assert (status, starts) == (0, ["## clean", "hard", "psd", "old", "## noisy", "psd"])
    assert "| – | – | – | – |" in titles[-1]  # no reference there
    assert "3 versions of the code" in said
    assert "No differences" in run_main(capsys, write_study(study, lines))[1]


def test_the_picture_has_a_panel_for_each_condition_and_a_bar_for_each_interval(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *how, **more: (drawn.append(self), save(self, *how, **more)))
    assert run_main(capsys, study, "--plot", study / "differences.png")[0] == 0
    assert (study / "differences.png").stat().st_size > 1000
    (panel,) = drawn[0].axes
    assert [tick.get_text() for tick in panel.get_yticklabels()] == [
        f"{of}/{METRIC}" for of in ("macro", "heldout", "vendor")
    ]
    points = [line for line in panel.lines if line.get_marker() == "o"]
    assert len(points) == 6 and len(panel.lines) == 13  # two methods' three points, a bar each, and the line at 0
    assert [float(points[0].get_xdata()[0])] == pytest.approx([2.0])  # macro, psd: means of (3, 1) and (2, 2)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["psd", "soft"]


def test_what_cannot_be_compared_is_refused_with_the_way_out(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: Any) -> str:
        status, said, error = run_main(capsys, *arguments)
        assert (status, said) == (2, "")
        return error

    assert "give the folder of a study" in refused(study / "nowhere")
    assert "--reference 'sof', of which no run is finished; allowed: hard, psd, soft" in refused(
        study, "--reference", "sof"
    )
    assert "--metric 'acc1' fits none; allowed: heldout/" in refused(study, "--metric", "acc1")
    lines = list(read_lines(study).values())
    write_study(study, lines, primary="x/acc1")
    assert "primary='x/acc1', which no run has; allowed: heldout/" in refused(study)
    write_study(study, lines, reference="hard")
    lines[0]["results"] = {"sets": {}}
    write_study(study, lines)
    assert "the results of hard/seed-1 cannot be compared" in refused(study)
    lines[0]["results"] = None
    write_study(study, lines)
    assert "--evaluate-again writes them anew" in refused(study)
    (study / "runs.jsonl").write_text("{}\n")
    assert "runs.jsonl holds something else than a line for each finished run" in refused(study)
    (study / "runs.jsonl").unlink()
    assert "has no finished run" in refused(study)


def test_records_of_another_evaluation_are_refused(study: Path) -> None:
    folder = folder_in(study, "hard/seed-1")
    folder.mkdir(parents=True)
    write_records(folder, {f"heldout/{METRIC}": hits([0, 1], [0.5, 0.6])})
    with pytest.raises(
        DataError, match=r"of hard/seed-1 is 0\.5, but the mean of its records 0\.55.*another evaluation"
    ):
        read_runs(study, read_lines(study), {})


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    assert read_records(tmp_path) == {}
    written = {"a b/text_retrieval_recall@1": hits([5, -1], [1 / 3, 1]), "vendor/acc1": hits([2], [0])}
    write_records(tmp_path, written)
    read = read_records(tmp_path)
    assert read.keys() == written.keys()
    for name, of in written.items():
        assert read[name].labels.tolist() == of.labels.tolist() and read[name].hits.tolist() == of.hits.tolist()
    (tmp_path / RECORDS).write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match="holds no records"):
        read_records(tmp_path)
