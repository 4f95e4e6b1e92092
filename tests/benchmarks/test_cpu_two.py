"""The table `two` of `python -m bench cpu`: which calls count, what a row says, and that no process stays."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from functools import partial

import pytest
import torch
from helpers.backends import needs_cpu_kernels

from bench import cpu, problems, records
from bench.cpu import two
from bench.outcomes import MEASURED
from bench.problems import Case

pytestmark = needs_cpu_kernels

CASE = Case("hard", torch.float32, 24, 16)
SHORT = two.Stretch(0.3, lead=0.1)


@pytest.fixture(autouse=True)
def no_process_stays():
    before = multiprocessing.active_children()
    yield
    assert multiprocessing.active_children() == before


def test_each_contender_has_a_row_with_its_ratios(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(two, "SIZES", (CASE.n,))
    monkeypatch.setattr(two, "Stretch", partial(two.Stretch, lead=SHORT.lead))
    cpu.main(["--only", "two", "--d", str(CASE.d), "--rounds", "2", "--seconds", str(SHORT.seconds), "--threads", "1"])
    (path,) = (tmp_path / "cpu").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["contender"], row["n"], row["threads"]) for row in rows] == [("cpu", 24, 1), ("dense", 24, 1)]
    for row in rows:
        assert (row["table"], row["outcome"]) == ("two", MEASURED)
        assert (len(row["alone"]["seconds"]), len(row["together"]["seconds"])) == (2, 4)
        medians = [row[name]["median"] for name in ("alone", "together")]
        assert min(medians) > 0 and row["ratio"] == pytest.approx(medians[1] / medians[0], rel=1e-4)
        assert row["ratio of means"] > 0 and min(row["calls alone"], row["calls together"]) > 0
        assert ("goal" in row) == ("reached" in row) == (row["contender"] == "cpu")
    assert rows[0]["reached"] == (rows[0]["ratio"] <= two.GOAL)


def test_a_row_is_made_of_the_medians_of_its_stretches():
    pair = two.Pair("cpu", CASE, alone=[[1.0, 2.0, 9.0], [4.0]], together=[[7.0], [6.0], [8.0], [9.0]])
    row = pair.row()
    assert row["alone"].seconds == (2.0, 4.0) and row["together"].seconds == (7.0, 6.0, 8.0, 9.0)
    assert row["ratio"] == 7.5 / 3.0 and row["reached"] is False
    assert row["ratio of means"] == 7.5 / statistics.fmean((1.0, 2.0, 9.0, 4.0))
    assert (row["calls alone"], row["calls together"]) == (4, 4)
    assert "goal" not in two.Pair("dense", CASE, alone=[[1.0]], together=[[1.0], [1.0]]).row()


def test_a_call_counts_where_the_other_process_made_calls_all_along():
    own = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]
    assert two.accompanied(own, [(0.5, 2.2), (2.3, 3.0)]) == [(1.0, 2.0), (2.0, 3.0)]
    assert two.accompanied(own, [(4.0, 5.0)]) == two.accompanied(own, []) == two.accompanied([], own) == []


def test_a_process_makes_calls_from_before_those_that_count_until_the_end(monkeypatch):
    clock, made = [0.0], []

    def run():
        made.append(clock[0])
        clock[0] += 1.0

    monkeypatch.setattr(two, "_run", run)
    monkeypatch.setattr(two.time, "monotonic", lambda: clock[0])
    assert two.calls(1.5, 4.5) == [(2.0, 3.0), (3.0, 4.0), (4.0, 5.0)] and made == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_each_process_is_alone_in_every_second_round(monkeypatch):
    asked = []

    class Worker:
        def call(self, function, arguments, limit):
            asked.append((self, function))
            return [(0.0, 1.0), (1.0, 2.0)]

        def end(self):
            pass

    monkeypatch.setattr(two, "ThreadPoolExecutor", _InTurns)
    workers = first, second = Worker(), Worker()
    pair = two.Pair("cpu", CASE, workers)
    for number in range(2):
        pair.take_turn(number, SHORT)
    assert asked == [(one, two.calls) for one in (first, first, second, second, first, second)]


class _InTurns:
    """Of a ThreadPoolExecutor, so that calls have an order."""

    def __init__(self, count):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


# What cannot be measured has a row that says so.


def test_processes_that_hang_are_ended(monkeypatch):
    """Their limit is over while they make calls."""
    monkeypatch.setattr(two, "CONTENDERS", ("cpu",))
    monkeypatch.setattr(two, "PATIENCE", -9.9)
    (row,) = two.measure(CASE, 2, two.Stretch(9.0, lead=1.0))
    assert row == {"contender": "cpu", **CASE.labels(), "outcome": "not finished after 0 s"}


def test_calls_that_do_not_fit_are_not_figures(monkeypatch):
    monkeypatch.setattr(two, "CONTENDERS", ("dense",))
    (row,) = two.measure(CASE, 2, two.Stretch(1e-9, lead=0.1))
    assert row == {"contender": "dense", **CASE.labels(), "outcome": "a call takes too long for stretches of 1e-09 s"}


def test_a_wrong_loss_gets_no_process(monkeypatch):
    right = problems.fused
    monkeypatch.setattr(problems, "fused", lambda *what: lambda *leaves: 1.05 * right(*what)(*leaves))
    monkeypatch.setattr(two, "Pair", lambda *_: pytest.fail("a process"))
    with pytest.raises(AssertionError, match="cpu against dense: loss"):
        two.measure(CASE, 1, SHORT)
    with pytest.raises(AssertionError, match=r"^loss: error"):
        two.two_at_once((CASE.n,), CASE.d, 1, SHORT)


def test_a_stretch_takes_time(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "Record", lambda *_: pytest.fail("a record was made"))
    with pytest.raises(SystemExit):
        cpu.main(["--seconds", "0"])
    assert "--seconds" in capsys.readouterr().err


def test_two_is_part_of_a_run():
    assert "two" in cpu.parse([]).only and cpu.parse([]).seconds == 2.0
