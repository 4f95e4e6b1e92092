"""`python -m bench peers`: whatever a peer does is a row, and every row is in the plots. Runs with the hosts that are
installed (all of them in .venv-hosts); a peer whose host is not there is skipped by name."""

from __future__ import annotations

import ctypes
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import peers
from bench.outcomes import MEASURED, hopeless
from bench.peers import Limits, losses, measure, plot, point
from bench.peers.losses import PEERS, Peer
from bench.problems import Case, operands
from bench.timing import Timing

D = 32
LIMITS = Limits(threads=1, memory=2**30, seconds=100.0, rounds=3, budget=100.0)
CASE = Case("", torch.float32, 40, D)
MIB = 2**20


def _dense(case):
    return losses.dense


def _at_size(case, planted):
    """The dense loss where a peer is readied, and something else where it is measured."""
    return losses.dense if case.n == point.CHECKED else planted


def _wrong(case):
    return lambda x, y, scale: 1.05 * losses.dense(x, y, scale)


def _wrong_at_size(case):
    return _at_size(case, lambda x, y, scale: 1.05 * losses.dense(x, y, scale))


def _raising(case):
    raise RuntimeError("planted\nand more")


def _frozen(case):
    return lambda x, y, scale: losses.dense(x, y.detach(), scale)


def _greedy_tensor(case):
    return _at_size(case, lambda x, y, scale: losses.dense(x, y, scale) + torch.empty(2**31).sum())


def _greedy_bytes(case):
    return _at_size(case, lambda x, y, scale: losses.dense(x, y, scale) + len(bytearray(2**32)))


def _slow(case):
    return _at_size(case, lambda x, y, scale: time.sleep(100))


def _later_slow(case):
    """From its second run on."""
    runs = []

    def loss(x, y, scale):
        runs.append(x)
        if len(runs) > 1:
            time.sleep(100)
        return losses.dense(x, y, scale)

    return _at_size(case, loss)


def _large(case):
    """Needs 64 MiB beside."""
    return _at_size(case, lambda x, y, scale: losses.dense(x, y, scale) + torch.zeros(16 * MIB).sum())


DENSE = Peer("dense", _dense)


def _rows(*contenders, case=CASE, limits=LIMITS, before=None):
    return measure(contenders, case, limits, before or {})


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "peer", [pytest.param(one, id=one.name, marks=[pytest.mark.long] * (one.name == "torch.compile")) for one in PEERS]
)
def test_every_peer_computes_its_loss(peer, dtype):
    """In float32 to the library's standard; in bfloat16, where others round the loss itself, and one direction the rows
    that it brings to unit norm, within 5 %."""
    if why := peer.missing():
        pytest.skip(why)
    n = 65
    given = operands(n, D, dtype)
    standard = losses.standard(peer.loss, *(operand.detach() for operand in given))
    loss = peer.make(Case(peer.loss, dtype, n, D))
    found = losses.result(losses.gradients(loss, given), standard.exact)
    if dtype == torch.bfloat16 and peer.name not in ("softclip_kernels", "softclip_kernels PSD"):
        for name in ("loss", "dx", "dy", "dscale"):
            exact = getattr(standard.exact, name)
            error = (getattr(found, name).double() - exact).abs().max() / exact.abs().max()
            assert error < 0.05, (name, error)
    else:
        standard.check(found)


def test_one_direction_is_not_both():
    """What the standard of the peers in one direction lets through."""
    given = operands(65, D, torch.float32)
    standard = losses.standard("rows", *(operand.detach() for operand in given))
    with pytest.raises(AssertionError, match="loss: error"):
        standard.check(losses.result(losses.gradients(losses.dense, given), standard.exact))
    rows = losses.with_unit_rows(
        lambda x, y, scale: torch.nn.functional.cross_entropy(scale * x @ y.T, torch.arange(65))
    )
    standard.check(losses.result(losses.gradients(rows, given), standard.exact))
    assert losses.gradients(lambda x, y, scale: (x * y).sum(), given)[3] is None


def test_right_peers_are_timed_in_turns_beside_ours():
    ours, psd, dense = _rows(PEERS[0], PEERS[1], DENSE)
    assert [row["peer"] for row in (ours, psd, dense)] == ["softclip_kernels", "softclip_kernels PSD", "dense"]
    for row in (ours, psd, dense):
        assert row["outcome"] == MEASURED and row["outside"] is None and row["error"] < 1e-4
        assert (row["n"], row["d"], row["dtype"], row["threads"]) == (40, D, "float32", 1)
        assert len(row["seconds"].seconds) == LIMITS.rounds
        assert row["of ours"] == row["seconds"].median / ours["seconds"].median


def test_every_peer_has_a_row_whatever_is_installed():
    """The hosts that are there, forked from a process that has imported them. (Compiling takes too long here.)"""
    every = [peer for peer in PEERS if peer.name != "torch.compile"]
    rows = _rows(*every, limits=replace(LIMITS, rounds=1))
    assert [row["peer"] for row in rows] == [peer.name for peer in every]
    for peer, row in zip(every, rows, strict=True):
        assert row["outcome"] == (peer.missing() or MEASURED)
        assert (row["version"] is None) == (peer.host is None or peer.missing() is not None)
        assert row["outcome"] != MEASURED or row["outside"] is None


def test_where_the_budget_allows_no_round_the_first_runs_stand():
    (row,) = _rows(DENSE, limits=replace(LIMITS, budget=0.0))
    assert len(row["seconds"].seconds) == 1 and "of ours" not in row


@pytest.mark.parametrize(("make", "where"), ((_wrong, "at N = 250: loss: "), (_wrong_at_size, "at N = 40: it against")))
def test_a_wrong_peer_is_timed_and_called_so(make, where):
    row, right = _rows(Peer("wrong", make), DENSE)
    assert row["outcome"] == MEASURED and row["seconds"].median > 0
    assert row["outside"].startswith(where) and 0.04 < row["error"] < 0.06
    assert right["outside"] is None


@pytest.mark.parametrize(
    ("make", "limits", "outcome"),
    (
        (_raising, {}, "RuntimeError: planted"),
        (_frozen, {}, "AssertionError: a gradient is missing: the loss does not depend on both of its operands"),
        (_greedy_tensor, {}, "over 1 GiB (asked for another 8.0 GiB)"),
        (_greedy_bytes, {}, "over 1 GiB"),
        (_slow, {"seconds": 1.0}, "over 1 s"),
        (_later_slow, {"seconds": 1.0}, "over 1 s"),
    ),
)
def test_a_peer_that_fails_is_a_row_and_the_others_are_measured(make, limits, outcome):
    row, right = _rows(Peer("it", make), DENSE, limits=replace(LIMITS, **limits))
    assert row["outcome"] == outcome and "seconds" not in row and (row["peer"], row["n"]) == ("it", 40)
    assert right["outcome"] == MEASURED and all(one > 0 for one in right["seconds"].seconds)


def test_a_peer_that_is_not_installed_is_a_row():
    lacking = Peer("lacking", _dense, host="no_such_host")
    unable = Peer("unable", _dense, why_not=_why_not)
    assert [row["outcome"] for row in _rows(lacking, unable)] == ["no_such_host is not installed", "too old"]


def test_without_anything_to_compare_with_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(point, "reference", _no_reference)
    (row,) = _rows(DENSE)
    assert row["outcome"] == "nothing to compare with: OSError: full"


def _no_reference(case, threads, path):
    raise OSError("full")


def _why_not():
    return "too old"


def test_memory_is_what_a_run_needs_beyond_inputs_and_gradients():
    small, large = _rows(DENSE, Peer("large", _large), limits=replace(LIMITS, budget=0.0))
    assert -1 < small["peak MiB"] < 8
    assert 60 < large["peak MiB"] - small["peak MiB"] < 72
    # Gradients of 2 * 20000 * 32 * 4 bytes are not counted, nor is what the checks before have freed.
    (wide,) = _rows(Peer("wide", _without_logits), case=replace(CASE, n=20000), limits=replace(LIMITS, budget=0.0))
    assert -1 < wide["peak MiB"] < 4


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_was_freed_before_counts_when_it_is_taken_again():
    (row,) = _rows(Peer("crumbs", _crumbs), limits=replace(LIMITS, budget=0.0))
    assert 15 < row["peak MiB"] < 20


def _crumbs(case):
    """16 MiB in pieces so small that glibc keeps them when they are freed, below one that stays."""

    def loss(x, y, scale):
        pieces = [torch.ones(16384) for _ in range(256)]
        kept.append(torch.ones(16384))
        return losses.dense(x, y, scale) + 0 * len(pieces)

    kept = []
    return loss


def _without_logits(case):
    """Two gradients, and next to nothing beside."""
    return _at_size(case, _Sum.apply)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale):
        ctx.save_for_backward(x, y)
        return x.new_zeros(()) * scale

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return y * grad, x * grad, grad


def test_what_cannot_fit_into_the_limits_is_not_tried():
    measured = {"outcome": MEASURED, "n": 1024, "seconds": Timing.of((3.0,))}
    assert hopeless(None, 2048, 1.0) is None
    assert hopeless(measured, 2048, 12.0) is None
    assert hopeless(measured, 2048, 11.0) == "not tried: 3 s at N = 1024, so over 11 s at N = 2048"
    untried = {"outcome": hopeless(measured, 2048, 11.0), "n": 2048}
    assert hopeless(untried, 4096, 11.0) == untried["outcome"]
    assert hopeless({"outcome": "over 8 GiB", "n": 1024}, 2048, 1.0) == "not tried: over 8 GiB"
    assert hopeless({"outcome": "RuntimeError: planted", "n": 1024}, 2048, 1.0) is None
    (row,) = _rows(DENSE, before={"dense": measured | {"n": 4}}, limits=replace(LIMITS, seconds=100.0))
    assert row["outcome"].startswith("not tried: 3 s at N = 4, so over")


def test_a_run_writes_its_record_and_draws_it(tmp_path, monkeypatch, capsys):
    names = ["softclip_kernels", "open_clip", "checkpointed blocks"]
    monkeypatch.setattr(peers, "PEERS", tuple(_without_host(one) for one in PEERS))
    arguments = ["--results", str(tmp_path), "--threads", "1", "--memory", "1"]
    peers.main(["--sizes", "48", "32", "--d", str(D), "--dtypes", "float32", "--peers", *names, *arguments])
    (path,) = (tmp_path / "peers").glob("*.json")
    found = json.loads(path.read_text())
    assert [(row["n"], row["peer"]) for row in found["rows"]] == [(n, name) for n in (32, 48) for name in names]
    outcomes = [MEASURED, "no_such_host is not installed", MEASURED]
    assert [row["outcome"] for row in found["rows"]] == 2 * outcomes
    assert capsys.readouterr().out.count("no_such_host is not installed") == 2
    peers.main(["--plot", "--pictures", str(tmp_path), *arguments])
    said = capsys.readouterr().out
    for name in ("time", "memory"):
        picture = tmp_path / f"peers_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and f"{picture}\n" in said


def _without_host(peer):
    return replace(peer, host="no_such_host") if peer.name == "open_clip" else peer


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (["--sizes", "0"], r"--sizes \[0\]"),
        (["--seconds", "0"], "--seconds 0"),
        (["--memory", "1e6"], "--memory 1e\\+06: no more than"),
        (["--peers", "nobody"], "invalid choice: 'nobody'"),
    ),
)
def test_bad_options_are_refused_before_anything_runs(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(peers, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        peers.main(arguments)
    assert re.search(said, capsys.readouterr().err)


# The plots.


def _row(peer, n, dtype="float32", outcome=MEASURED, d=D, run="2026 b", **figures):
    labels = {"peer": peer, "dtype": dtype, "n": n, "d": d, "threads": 2, "outcome": outcome, "run": run}
    return {**labels, "seconds": {"median": n / 1000}, "peak MiB": float(n), "outside": None, **figures}


def _record(path: Path, rows):
    runs = {run: {"commit": f"c0ffee{run[-1]}", "versions": {"torch": "2.13"}} for run in ("2026 a", "2026 b")}
    path.write_text(json.dumps({"kind": "peers", "machine": "a machine", "runs": runs, "rows": rows}))
    return path


def _points(axes):
    return {(x, y) for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}


def test_every_row_is_a_point_or_a_line_of_text(tmp_path, drawn):
    rows = [
        _row("softclip_kernels", 2048),
        _row("softclip_kernels", 1024, **{"peak MiB": -0.5}),
        _row("open_clip", 1024, outside="at N = 250: loss"),
        _row("open_clip", 2048, outcome="over 8 GiB"),
        _row("open_clip", 4096, outcome="not tried: over 8 GiB"),
        _row("MNRL", 512, "bfloat16"),
        _row("NTXentLoss", 512, "bfloat16", outcome="it is not installed"),
        _row("MNRL", 256, d=64, run="2026 a"),
    ]
    assert [path.name for path in plot.draw(_record(tmp_path / "r.json", rows), tmp_path)] == [
        "peers_time.png", "peers_memory.png"
    ]  # fmt: skip
    assert [_points(axes) for axes in drawn[0].axes] == [{(1024, 1.024), (2048, 2.048)}, {(512, 0.512)}]
    assert [_points(axes) for axes in drawn[1].axes] == [{(1024, 1.0), (2048, 2048.0), (1024, 1024.0)}, {(512, 512.0)}]
    for figure in drawn:
        assert figure.get_supxlabel().split("\n") == [
            "a machine, 2 threads, D = 32, torch 2.13, commit c0ffeeb",
            "no point: open_clip, float32, N = 2048, 4096: over 8 GiB",
            "no point: NTXentLoss, bfloat16, N = 512: it is not installed",
            "hollow: further from the exact gradient or loss than this library allows itself",
            "not drawn: the record's rows of D = 64 with 2 threads",
        ]
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [
            "softclip_kernels", "open_clip", "MNRL (one direction)"
        ]  # fmt: skip
        assert [(axes.get_title(), axes.get_xscale(), axes.get_yscale()) for axes in figure.axes] == [
            ("float32", "log", "log"), ("bfloat16", "log", "log")
        ]  # fmt: skip
        hollow = [line for axes in figure.axes for line in axes.lines if line.get_markerfacecolor() == "white"]
        assert [list(line.get_xdata()) for line in hollow] == [[1024]]


def test_every_peer_has_a_look_of_its_own():
    assert list(plot.STYLES) == [peer.name for peer in PEERS]
    looks = [(colour, marker) for colour, marker, _ in plot.STYLES.values()]
    assert len(set(looks)) == len(looks)


def test_a_record_with_nothing_to_draw_is_refused_by_name(tmp_path):
    for path, said in (
        (tmp_path / "none.json", "is not there: python -m bench peers measures it"),
        (_record(tmp_path / "empty.json", []), "nothing in it was measured"),
        (_record(tmp_path / "failed.json", [_row("MNRL", 512, outcome="over 1 s")]), "nothing in it was measured"),
    ):
        with pytest.raises(SystemExit, match=said) as refused:
            plot.draw(path, tmp_path)
        assert str(path) in refused.value.code
