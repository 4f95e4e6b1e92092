"""The table `small` of `python -m bench cpu`: who is measured, who is refused, and what the ratios say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.backends import needs_cpu_kernels

from bench import cpu, problems, records, timing
from bench.cpu import small
from bench.outcomes import MEASURED
from bench.problems import BUILT_IN, Case
from bench.timing import Timing

pytestmark = needs_cpu_kernels

D = 16
F32, BF16 = torch.float32, torch.bfloat16
HARD, HARD_BF16 = (Case("hard", dtype, 24, D) for dtype in (F32, BF16))
CONTENDERS = {
    ("hard", "float32"): ["cpu", "dense", BUILT_IN],
    ("hard", "bfloat16"): ["cpu", "dense", "dense in float32", BUILT_IN],
    ("psd", "float32"): ["cpu", "dense"],
    ("psd", "bfloat16"): ["cpu", "dense", "dense in float32"],
}
needs_built_in = pytest.mark.skipif(bool(problems.why_no_built_in()), reason=str(problems.why_no_built_in()))


def _measured(case=HARD, rounds=1, limit=100.0, before=None):
    """The rows of a case, by contender."""
    return {row["contender"]: row for row in small.measure(case, rounds, limit, before or {})}


# The rows.


@needs_built_in
def test_every_contender_has_a_row_with_its_time_and_its_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    cpu.main(["--only", "small", "--sizes", "48", "16", "--d", str(D), "--rounds", "2", "--threads", "1"])
    (path,) = (tmp_path / "cpu").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["loss"], row["dtype"], row["n"], row["contender"]) for row in rows] == [
        (*case, n, contender) for case, names in CONTENDERS.items() for n in (16, 48) for contender in names
    ]
    for row in rows:
        assert (row["table"], row["outcome"], row["threads"]) == ("small", MEASURED, 1)
        assert len(row["seconds"]["seconds"]) == 2 and row["seconds"]["median"] > 0
        assert ("reached" in row) == ("over dense float32" in row) == (row["contender"] == "cpu")
    assert capsys.readouterr().out.count("linear_cross_entropy  hard  bfloat16  48  16  measured") == 1


@pytest.mark.parametrize("loss", small.LOSSES)
def test_the_errors_tell_who_rounds_logits(loss):
    """A rounded logit is off by up to 14.3 / 256; what the library's own bounds allow is 1e-6 of the loss, and 1e-2 of
    the gradients, which are rounded themselves."""
    rows = _measured(Case(loss, BF16, 48, D))
    for name in ("cpu", "dense in float32"):
        assert rows[name]["loss error"] < 1e-6 and rows[name]["gradient error"] < 5e-3
    assert rows["dense"]["loss error"] > 1e-4 and 5e-3 < rows["dense"]["gradient error"] < 0.05
    for row in _measured(Case(loss, F32, 48, D)).values():
        assert max(row["loss error"], row["gradient error"]) < 1e-5


def test_above_what_fits_the_chunked_backend_in_float64_stands_in(monkeypatch):
    for case in (HARD_BF16, Case("psd", F32, 24, D)):
        leaves = [operand.detach() for operand in case.operands()]
        with monkeypatch.context() as context:
            context.setattr(small, "STANDARD_UP_TO", case.n - 1)
            context.setattr(small, "truth", lambda *_: pytest.fail("a dense loss that does not fit"))
            blocks = small._exact(case, *leaves)
        errors = problems.relative_errors(blocks, small._exact(case, *leaves), leaves[0], leaves[2])
        assert blocks.dx.dtype == torch.float64 and max(errors.values()) < 1e-12


@needs_built_in
def test_torchs_own_loss_takes_no_more_pieces_than_it_would(monkeypatch):
    sizes = ((32, 512, 1), (1024, 512, 2), (8192, 512, 16), (65536, 512, 16), (24, 16, 2))
    assert [problems.fewest_pieces(n, d) for n, d, _ in sizes] == [pieces for *_, pieces in sizes]
    taken, right = [], torch.nn.LinearCrossEntropyOptions

    def options(batch_chunk_size):
        taken.append(batch_chunk_size)
        return right(batch_chunk_size=batch_chunk_size)

    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", options)
    _measured()
    assert set(taken) == {12}  # of 24 rows


def test_an_older_torch_has_no_such_loss_and_a_row_says_so(monkeypatch):
    monkeypatch.delattr(F, BUILT_IN, raising=False)
    rows = _measured()
    assert rows[BUILT_IN]["outcome"] == f"torch {torch.__version__} has none" and "seconds" not in rows[BUILT_IN]
    assert rows["cpu"]["outcome"] == MEASURED and f"over {BUILT_IN}" not in rows["cpu"]


# Who is wrong is not timed.


def _spoil(monkeypatch, what, factor=1.05, when=lambda *_: True):
    """A loss of `problems` is off where its operands are such; nothing may be timed."""
    right = getattr(problems, what)

    def made(*arguments, **options):
        loss = right(*arguments, **options)
        return lambda x, y, scale: loss(x, y, scale) * (factor if when(x, options) else 1.0)

    def built_in(x, y, scale, pieces=None):
        return right(x, y, scale, pieces) * (factor if when(x, {}) else 1.0)

    monkeypatch.setattr(problems, what, built_in if what == "built_in" else made)
    monkeypatch.setattr(small, "interleaved", lambda *_, **__: pytest.fail("timed"))


@pytest.mark.parametrize(
    ("what", "case", "named"),
    (
        ("fused", HARD, "cpu against float64: loss"),
        ("fused", HARD_BF16, "cpu against float64: loss"),
        ("dense", HARD, "dense against float64: loss"),
        pytest.param("built_in", HARD, f"{BUILT_IN} against float64: loss", marks=needs_built_in),
    ),
)
def test_a_wrong_contender_is_refused_at_the_size_itself(what, case, named, monkeypatch):
    _spoil(monkeypatch, what)
    with pytest.raises(AssertionError, match=named):
        _measured(case)


def test_a_wrong_loss_in_float32_of_bfloat16_is_refused(monkeypatch):
    _spoil(monkeypatch, "dense", when=lambda x, options: "rounded" in options)
    with pytest.raises(AssertionError, match="dense in float32 against float64: loss"):
        _measured(HARD_BF16)


@pytest.mark.parametrize("what", ("dense", pytest.param("built_in", marks=needs_built_in)))
def test_rounding_excuses_no_more_than_rounding(what, monkeypatch):
    _spoil(monkeypatch, what, 1.2, lambda x, _: x.dtype == BF16)
    name = "dense" if what == "dense" else BUILT_IN
    with pytest.raises(AssertionError, match=f"^{name}: loss is off by 2.0e-01 of its size, more than 0.1"):
        _measured(HARD_BF16)


def test_a_loss_that_is_wrong_on_many_rows_is_refused_before_any_size(monkeypatch):
    _spoil(monkeypatch, "fused", when=lambda x, _: len(x) == 1000)
    with pytest.raises(AssertionError, match="loss: error"):
        small.small_batches([16], D, 1, 100.0)


# Who is slow has a row that says so.


@pytest.fixture
def slow_dense(monkeypatch):
    """The dense loss in its own dtype takes so many seconds by the clock of the first calls; its calls by N."""
    clock, calls, right = [0.0], [], problems.dense

    def at(seconds):
        def made(*arguments, rounded=None, **options):
            loss = right(*arguments, rounded=rounded, **options)

            def run(x, y, scale):
                clock[0] += seconds if rounded is None else 0.0
                calls.append((len(x), rounded is None))
                return loss(x, y, scale)

            return run

        monkeypatch.setattr(problems, "dense", made)
        return calls

    monkeypatch.setattr(small, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    return at


def test_a_slow_contender_is_reported_with_its_errors_and_not_timed(slow_dense):
    calls = slow_dense(7.0)
    rows = _measured(HARD_BF16, limit=5.0)
    assert rows["dense"]["outcome"] == "over 5 s: 7 s a call at N = 24" and "seconds" not in rows["dense"]
    assert rows["dense"]["loss error"] > 0 and calls.count((24, True)) == 1
    assert all(row["outcome"] == MEASURED for name, row in rows.items() if name != "dense")
    assert "over dense" not in rows["cpu"] and rows["cpu"]["over dense float32"] > 0
    larger = _measured(Case("hard", BF16, 48, D), limit=5.0, before=rows)
    assert (
        larger["dense"]["outcome"] == "not tried: over 5 s: 7 s a call at N = 24"
        and "loss error" not in larger["dense"]
    )
    assert calls.count((48, True)) == 0 and larger["cpu"]["outcome"] == MEASURED


def test_a_contender_that_takes_a_while_is_timed_fewer_times(slow_dense):
    calls = slow_dense(2 * small.SLOW)
    rows = _measured(rounds=small.SLOW_ROUNDS + 2)
    assert len(rows["dense"]["seconds"].seconds) == small.SLOW_ROUNDS
    assert len(rows["cpu"]["seconds"].seconds) == small.SLOW_ROUNDS + 2
    assert len(calls) == 1 + small.SLOW_ROUNDS  # the check, and one call a round


def test_a_size_is_not_tried_where_the_one_before_was_long_and_not_where_it_was_short():
    before = {"outcome": MEASURED, "n": 1024, "seconds": Timing.of((0.2,))}
    assert small._hopeless(before, 8192, 12.0) == "not tried: 0.2 s at N = 1024, so over 12 s at N = 8192"
    assert small._hopeless(before, 8192, 13.0) is None
    # 0.09 s at N = 32 may all be fixed costs, and says nothing of N = 8192.
    assert small._hopeless(before | {"n": 32, "seconds": Timing.of((0.09,))}, 8192, 1.0) is None
    assert small._hopeless(None, 32, 1.0) is None


# Ratios and goals.


@pytest.mark.parametrize(
    ("n", "goal"), ((16, None), (32, 0.7), (127, 0.7), (128, 1.0), (1023, 1.0), (1024, 1.3), (8192, 1.3))
)
def test_the_goal_of_a_size(n, goal):
    row = small.ratios({"cpu": 1.0, "dense": 1.29}, Case("psd", F32, n, D))
    assert row["goal"] == goal and row["reached"] == (None if goal is None else goal < 1.3)


def test_ratios_are_to_dense_in_float32_too():
    f32, bf16 = (Case("hard", dtype, 1024, D) for dtype in (F32, BF16))
    assert small.ratios({"cpu": 2.0, "dense": 2.6, BUILT_IN: 5.0}, f32) == {
        "over dense": 1.3, f"over {BUILT_IN}": 2.5, "over dense float32": 1.3, "goal": 1.3, "reached": True
    }  # fmt: skip
    assert small.ratios({"cpu": 2.0, "dense": 50.0, "dense in float32": 2.5, BUILT_IN: 5.0}, bf16) == {
        "over dense": 25.0, f"over {BUILT_IN}": 2.5, "over dense float32": 1.25, "goal": 1.3, "reached": False
    }  # fmt: skip
    # Where there is nothing to compare with, nobody knows.
    assert small.ratios({"cpu": 2.0}, f32)["reached"] is None
    assert small.ratios({"cpu": 2.0, "dense": 50.0}, bf16)["reached"] is None
    assert small.ratios({"dense": 2.0}, f32) == {}


def test_the_rows_ratios_are_those_of_their_medians():
    for case in (HARD, HARD_BF16):
        rows = _measured(case, rounds=3)
        median = {name: row["seconds"].median for name, row in rows.items() if "seconds" in row}
        assert rows["cpu"]["over dense"] == median["dense"] / median["cpu"]
        in_float32 = median["dense" if case.dtype == F32 else "dense in float32"]
        assert rows["cpu"]["over dense float32"] == in_float32 / median["cpu"]


# Measuring.


def test_a_short_run_is_measured_by_as_many_calls_as_take_long_enough(monkeypatch):
    clock, calls = [0.0], []

    def run():
        calls.append(1)
        clock[0] += 0.0625

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    measure = timing.repeated(run, 0.5)
    calls.clear()
    assert measure() == 0.0625 and len(calls) == 8
    measure = timing.repeated(run, 0.01)
    calls.clear()
    assert measure() == 0.0625 and len(calls) == 1


def test_a_measurement_takes_long_enough(monkeypatch):
    asked = []
    monkeypatch.setattr(small, "repeated", lambda run, shortest: (asked.append(shortest), lambda: 1.0)[1])
    assert all(row["seconds"].median == 1.0 for row in _measured(Case("psd", F32, 24, D)).values())
    assert asked == [0.02, 0.02]


def test_a_contender_of_few_rounds_is_in_the_first_ones():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = timing.interleaved(runs, 4, at_most={"b": 2})
    assert {name: len(one.seconds) for name, one in timings.items()} == {"a": 4, "b": 2}
    assert calls == ["a", "b", "a", "a", "b", "a", "a"]


@pytest.mark.parametrize("arguments", (["--sizes", "0"], ["--limit", "0"]))
def test_bad_options_are_refused_before_anything_runs(arguments, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "Record", lambda *_: pytest.fail("a record was made"))
    with pytest.raises(SystemExit):
        cpu.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_small_is_part_of_a_run():
    assert "small" in cpu.parse([]).only and cpu.parse([]).sizes == [32, 128, 256, 512, 1024, 2048]
