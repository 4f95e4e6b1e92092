"""What the fused loss is timed beside on a GPU, and how: torch's own loss, CUDA graphs, shares at equal clock; with
stand-ins for what only a GPU has."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.backends import needs_triton

from bench import cpu, problems
from bench.gpu import clock, graphs, rehearsal, steps
from bench.gpu.clock import Clock
from bench.problems import BUILT_IN, Case
from softclip_kernels.testing import Result

SMALL = Case("hard", torch.float32, 33, 16)
needs_built_in = pytest.mark.skipif(bool(problems.why_no_built_in()), reason=str(problems.why_no_built_in()))


@pytest.fixture
def on_a_processor(monkeypatch):
    for name, value in rehearsal.stand_ins().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))


def _joined(case, rival):
    """Whether the rival may be timed, and the row that says what became of it."""
    contenders = {}
    row = steps.add_rivals(contenders, (rival,), case, case.operands())
    return rival in contenders, row


# torch's own loss without a matrix of logits.


@needs_built_in
def test_the_built_in_loss_is_the_hard_one_and_found_to_be(on_a_processor, monkeypatch):
    problems.check("hard", 16, torch.float32, n=65)
    assert _joined(SMALL, BUILT_IN)[0]
    right = problems.built_in
    monkeypatch.setattr(problems, "built_in", lambda x, y, scale: 1.05 * right(x, y, scale))
    with pytest.raises(AssertionError, match="loss: error"):
        problems.check("hard", 16, torch.float32, n=65)
    timed, row = _joined(SMALL, BUILT_IN)
    assert not timed and row[BUILT_IN].startswith("failed: AssertionError: loss differs from float32 by 5.0e-02")


@needs_built_in
def test_as_many_pieces_as_a_gpu_would_take_cost_bfloat16_its_digits(on_a_processor, monkeypatch):
    case = Case("hard", torch.bfloat16, 2048, 32)
    assert _joined(case, BUILT_IN)[0]
    monkeypatch.setattr(problems, "PIECES", 2 * case.n // case.d)
    timed, row = _joined(case, BUILT_IN)
    assert not timed and "loss differs from float32" in row[BUILT_IN]


def test_an_older_torch_has_no_such_loss_and_the_rows_say_so(on_a_processor, monkeypatch):
    monkeypatch.delattr(F, BUILT_IN, raising=False)
    timed, row = _joined(SMALL, BUILT_IN)
    assert not timed and row == {BUILT_IN: f"torch {torch.__version__} has none"}
    assert _joined(SMALL, steps.EAGER)[0]
    if cpu.cpu.levels():
        hard = [row for row in cpu.speed(65, 32, 1) if row["loss"] == "hard"]
        assert {row[BUILT_IN] for row in hard} == {f"torch {torch.__version__} has none"}


# CUDA graphs.


class _Graph:
    """Runs nothing while it captures and, replayed, does what `calls` is told."""

    def __init__(self):
        calls.append("made")

    def replay(self):
        calls.append("replayed")


calls: list[str] = []


@contextlib.contextmanager
def _noted(what):
    calls.append(f"{what} begins")
    yield
    calls.append(f"{what} ends")


class _Stream:
    def wait_stream(self, other):
        calls.append("waits")


def test_a_pass_is_captured_after_one_on_the_side_and_then_replayed(monkeypatch):
    calls.clear()
    stand_ins = {
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: _noted("side"),
        "CUDAGraph": _Graph,
        "graph": lambda graph: _noted("capture"),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    what, replay = graphs.captured(lambda: calls.append("pass") or len(calls), "cuda")
    expected = ["waits", "side begins", "pass", "side ends", "waits", "made", "capture begins", "pass", "capture ends"]
    assert what == "replayed as a CUDA graph" and calls == expected
    assert replay() == replay() == 8 and calls[len(expected) :] == ["replayed"] * 2


def test_a_graph_that_holds_on_to_its_operands_is_not_timed():
    x, y, scale = (leaf.detach() for leaf in SMALL.operands())
    loss = SMALL.dense()

    def run():
        return Result.of(loss, x, y, scale)

    graphs.check_replay(run, run, x, y, scale)
    stale = run()
    with pytest.raises(AssertionError, match="loss, dx, dy, dscale of a replayed graph differ"):
        graphs.check_replay(lambda: stale, run, x, y, scale)
    kept = y.clone()
    with pytest.raises(AssertionError, match="replayed graph"):
        graphs.check_replay(lambda: Result.of(loss, x, kept, scale), run, x, y, scale)


@pytest.mark.parametrize("loss", graphs.RIVALS)
def test_without_a_gpu_the_row_says_what_stands_for_the_graph(on_a_processor, monkeypatch, loss):
    monkeypatch.setattr(Case, "fused", lambda case, backend: case.dense())
    row = graphs.graph(replace(SMALL, loss=loss), 1, 0.0)
    assert row["outcome"] == "no CUDA graph on a cpu, a pass stands in for it"
    for rival in graphs.RIVALS[loss]:
        if f"over {rival}" in row or rival == steps.EAGER:
            assert row[f"over {rival}"] == pytest.approx(row[rival].median / row["fused"].median)
            assert row[f"graph over {rival}"] == pytest.approx(row[rival].median / row["graph"].median)


# Shares at equal clock.


def test_a_clock_is_the_median_over_those_multiprocessors_that_answered_twice():
    twice = ([100, 50], [1900, 1050]), ([7, 50], [1707, 1050]), ([900, 50], [2900, 1050])  # 1800, 1700 and 2000 MHz
    late = 3 * (([0, 0], [9000, 1050]),)
    early = 3 * (([9000, 50], [0, 0]),)
    started_again = 3 * (([9000, 50], [1000, 1050]),)
    for others in (late, early, started_again):
        before, after = (torch.tensor(counters) for counters in zip(*twice, *others, strict=True))
        assert clock.megahertz(before, after) == [1800]
        assert clock.megahertz(before[3:], after[3:]) == []


def _ticking(monkeypatch, rates):
    """Counters whose clock is the next of these rates (MHz) from each reading to the one after."""
    cycles, nanoseconds = [1.0], [1]
    rates = iter(rates)

    def counters(device):
        rate = next(rates, 0)
        cycles[0], nanoseconds[0] = cycles[0] + rate, nanoseconds[0] + 1000
        return torch.tensor([[int(cycles[0]), nanoseconds[0]]])

    monkeypatch.setattr(clock, "counters", counters)


def test_a_share_at_equal_clock_is_todays_times_the_clocks_ratio(on_a_processor, monkeypatch):
    """The loss runs at 1500 MHz, the products at 1200 MHz: the share of what they would reach at its clock is less."""
    _ticking(monkeypatch, (1, 1, 1500, 1, 1200, 1, 1500))
    contenders = {"fused": lambda: None, "gemm": lambda: None}
    measured = Clock("cuda")
    for name in ("fused", "gemm", "fused"):
        assert measured.device_seconds(contenders[name]) >= 0
    row = steps._at_equal_clock(0.75, measured, contenders)
    assert row == {"fused MHz": 1500, "gemm MHz": 1200, steps.EQUAL_CLOCK: pytest.approx(0.60)}


def test_where_no_clock_is_known_there_is_none_and_the_timing_goes_on(on_a_processor, monkeypatch):
    def fails(device):
        tried.append(device)
        raise RuntimeError("no such counter")

    tried: list[str] = []
    monkeypatch.setattr(clock, "counters", fails)
    contenders = {"fused": lambda: None, "gemm": lambda: None}
    measured = Clock("cuda")
    assert measured.device_seconds(contenders["fused"]) >= 0 and tried == ["cuda"]
    row = steps._at_equal_clock(0.75, measured, contenders)
    assert row == {steps.EQUAL_CLOCK: "clock not known: RuntimeError: no such counter"}


@needs_triton
def test_the_counters_are_those_of_the_multiprocessor():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.gpu import counters_kernel

    source = ASTSource(
        fn=counters_kernel.counters_kernel,
        signature={"out": "*i64", "SLOTS": "constexpr"},
        constexprs={(1,): counters_kernel.SLOTS},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    lines = [line.strip() for line in compiled.asm["ptx"].splitlines()]
    for counter in ("%smid", "%clock64", "%globaltimer"):
        assert sum(line.startswith("mov.") and line.endswith(f"{counter};") for line in lines) == 1, counter
    assert sum("st.global" in line for line in lines) == 2
