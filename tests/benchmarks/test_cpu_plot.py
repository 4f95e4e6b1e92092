"""docs/cpu_time.png and the figures of docs/performance.md: every row is shown, or named with its reason."""

from __future__ import annotations

import json

import pytest
from helpers import ROOT

from bench import cpu
from bench.cpu import page, plot, small
from bench.outcomes import MEASURED
from bench.problems import BUILT_IN, Case

D = 32


def _row(contender, loss, n, dtype="float32", **more):
    row = {"table": "small", "contender": contender, "loss": loss, "dtype": dtype, "n": n, "d": D, "threads": 2}
    figures = {"seconds": {"median": n / 1000}, "loss error": 2.5e-7, "gradient error": 1e-3}
    reason = more.get("outcome", MEASURED)
    return {**row, "outcome": reason, "run": "2026 b", **(figures if reason == MEASURED else {}), **more}


def _speed(loss, n, dtype="float32", **more):
    row = {"table": "speed", "loss": loss, "dtype": dtype, "n": n, "d": D, "threads": 2, "run": "2026 a"}
    row |= {"pass": "forward + backward", "scale": 14.3}
    return row | {"cpu": {"median": n / 500}, "dense": {"median": n / 400}, BUILT_IN: {"median": n / 300}} | more


GOAL = {"over dense float32": 1.25, "goal": 1.3, "reached": False}
ROWS = [
    _row("cpu", "hard", 128, **{**GOAL, "goal": 1.0, "reached": True}),
    _row("cpu", "hard", 32, **GOAL),
    _row("dense", "hard", 32),
    _row("cpu", "psd", 32),
    _row("cpu", "hard", 32, "bfloat16"),
    _row("dense", "hard", 32, "bfloat16", outcome="over 10 s: 12 s a call at N = 32"),
    _row("dense", "hard", 128, "bfloat16", outcome="not tried: over 10 s: 12 s a call at N = 32"),
    _row("dense in float32", "hard", 32, "bfloat16"),
    _row(BUILT_IN, "hard", 32, "bfloat16", outcome="torch 2.8 has none"),
    {"table": "memory", "loss": "hard", "dtype": "float32", "n": 64, "d": D, "threads": 2, "run": "2026 b"},
]


@pytest.fixture
def record(tmp_path):
    """Writes a record of these rows."""

    def write(rows=ROWS):
        runs = {run: {"commit": f"c0ffee{run[-1]}", "versions": {"torch": "2.13"}} for run in ("2026 a", "2026 b")}
        path = tmp_path / "record.json"
        path.write_text(json.dumps({"kind": "cpu", "machine": "a machine", "runs": runs, "rows": rows}))
        return path

    return write


def _lines(figure):
    """Of every panel: the looks and points of its lines."""
    return {
        axes.get_title(): {
            (line.get_color(), line.get_linestyle()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            for line in axes.lines
        }
        for axes in figure.axes
    }


def test_every_row_is_a_point_or_a_line_of_text(record, tmp_path, drawn):
    path = plot.draw(record(), tmp_path)
    assert path == tmp_path / "cpu_time.png" and path.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    ours, dense, in_float32 = (plot.LOOKS[name][0] for name in ("cpu", "dense", "dense in float32"))
    assert _lines(figure) == {
        "float32": {
            (ours, "-"): [(32, 0.032), (128, 0.128)],
            (ours, "--"): [(32, 0.032)],
            (dense, "-"): [(32, 0.032)],
        },
        "bfloat16": {(ours, "-"): [(32, 0.032)], (in_float32, "-"): [(32, 0.032)]},
    }
    assert [(axes.get_xscale(), axes.get_yscale()) for axes in figure.axes] == [("log", "log")] * 2
    assert figure.get_supxlabel().split("\n") == [
        "a machine, 2 threads, D = 32, torch 2.13, commit c0ffeeb",
        "no point: dense, hard, bfloat16, N = 32, 128: over 10 s: 12 s a call at N = 32",
        f"no point: {BUILT_IN}, hard, bfloat16, N = 32: torch 2.8 has none",
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "softclip_kernels, hard", "softclip_kernels, psd", "dense, hard", "dense in float32, hard"
    ]  # fmt: skip


def test_rows_of_another_width_or_thread_count_are_named(record, tmp_path, drawn):
    plot.draw(record([*ROWS, _row("cpu", "hard", 32, d=64, run="2026 a")]), tmp_path)
    assert "not drawn: the record's rows of D = 64 with 2 threads" in drawn[0].get_supxlabel().split("\n")


def test_the_speed_table_gives_larger_sizes(record, tmp_path, drawn):
    n = 16 * D
    rows = [
        _speed("hard", n),
        _speed("hard", 128),  # ours is known from `small`; and torch's own takes more pieces here than there
        _speed("hard", 2 * n, **{BUILT_IN: "torch 2.8 has none"}),
        _speed("hard", 3 * n, scale=100.0),
        _speed("hard", 4 * n, **{"pass": "forward"}),
        _speed("hard", 5 * n, d=64),
        _speed("psd_teacher", 6 * n),
    ]
    plot.draw(record([*ROWS, *rows]), tmp_path)
    assert {
        contender: _lines(drawn[0])["float32"].get((plot.LOOKS[contender][0], "-")) for contender in plot.LOOKS
    } == {
        "cpu": [(32, 0.032), (128, 0.128), (n, n / 500), (2 * n, 2 * n / 500)],
        "dense": [(32, 0.032), (128, 128 / 400), (n, n / 400), (2 * n, 2 * n / 400)],
        "dense in float32": None,
        BUILT_IN: [(n, n / 300)],
    }
    title, *_, said = drawn[0].get_supxlabel().split("\n")
    assert said == f"from the table speed: N = 128, {n}, {2 * n}"
    assert title.endswith("commit c0ffeeb, c0ffeea")


def test_every_contender_has_a_look_of_its_own():
    cases = [Case(loss, dtype, 16, 16) for loss in small.LOSSES for dtype in small.DTYPES]
    assert {one.name for case in cases for one in small.contenders(case)} == set(plot.LOOKS)
    assert len({look[:2] for look in plot.LOOKS.values()}) == len({look[0] for look in plot.LOOKS.values()}) == 4


@pytest.mark.parametrize("show", (lambda path: plot.draw(path, path.parent), page.measured), ids=("plot", "page"))
def test_a_record_with_nothing_to_show_is_refused_by_name(show, record, tmp_path):
    with pytest.raises(SystemExit, match=r"none.json is not there: python -m bench cpu measures it"):
        show(tmp_path / "none.json")
    for rows in ([], [_row("cpu", "hard", 32, outcome="over 1 s")], [_speed("hard", 16 * D)], ROWS[-1:]):
        with pytest.raises(SystemExit, match=r"record.json: nothing in it was measured"):
            show(record(rows))


# The page.


def test_the_page_tells_times_errors_goals_and_what_has_no_time(record):
    picture, where, *tables = page.measured(record()).split("\n\n")
    assert picture == "![time by batch size](cpu_time.png)"
    assert where.replace("\n", " ") == (
        "a machine, 2 threads, D = 32, torch 2.13, commit c0ffeeb (rows in record.json)."
    )
    assert tables[0::2] == ["### float32", "### bfloat16"]
    assert tables[1].splitlines() == [
        "| loss | N | softclip_kernels | dense | times as fast as dense in float32 | goal |",
        "| --- | --- | --- | --- | --- | --- |",
        "| hard | 32 | 32 ms (2e-7, 1e-3) | 32 ms (2e-7, 1e-3) | 1.25 | 1.3, missed |",
        "| hard | 128 | 128 ms (2e-7, 1e-3) |  | 1.25 | 1 |",
        "| psd | 32 | 32 ms (2e-7, 1e-3) |  |  |  |",
    ]
    assert tables[3].splitlines()[2:] == [
        "| hard | 32 | 32 ms (2e-7, 1e-3) | no time: over 10 s: 12 s a call at N = 32 | 32 ms (2e-7, 1e-3) "
        "| no time: torch 2.8 has none |  |  |",
        "| hard | 128 |  | no time: over 10 s: 12 s a call at N = 32 |  |  |  |  |",
    ]
    slow = page.measured(record([_row("cpu", "psd", 8192)])).splitlines()[-1]
    assert slow == "| psd | 8192 | 8.19 s (2e-7, 1e-3) |  |  |"


def test_figures_take_the_place_of_those_before(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "small_batches", lambda *_: pytest.fail("measured"))
    arguments = ["--plot", "--only", "small", "--record", str(record()), "--pictures", str(tmp_path)]
    cpu.main(arguments)
    printed = capsys.readouterr().out
    assert page.measured(record()) in printed  # there is no page to write them to
    place = tmp_path / "performance.md"
    place.write_text(f"before\n\n{page.BEGIN}\n\n{page.END}\n\nbehind\n")
    for _ in range(2):
        cpu.main(arguments)
        assert capsys.readouterr().out.split() == [str(tmp_path / "cpu_time.png"), str(place)]
        text = page.measured(record())
        assert place.read_text() == f"before\n\n{page.BEGIN}\n\n{text}\n\n{page.END}\n\nbehind\n"
    for spoilt in (page.BEGIN, page.END, f"{page.END}\n{page.BEGIN}"):
        place.write_text(spoilt)
        with pytest.raises(SystemExit, match=r"performance.md has no place for figures"):
            cpu.main(arguments)
        assert place.read_text() == spoilt


def test_the_page_in_the_tree_has_their_place(tmp_path):
    copy = tmp_path / page.PAGE
    copy.write_text((ROOT / "docs" / page.PAGE).read_text())
    page.fill(copy, "figures")
    assert "figures" in copy.read_text()
