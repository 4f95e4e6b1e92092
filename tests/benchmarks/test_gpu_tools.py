"""The tools for tuning on a GPU, each walked on the CPU: Triton's interpreter, and stand-ins for the device
(rehearsal.py) and for NVIDIA's programs."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.backends import needs_cpu_kernels, needs_triton

from bench import compare
from bench.gpu import rehearsal
from bench.gpu_tools import ab, breakdown, external, kernels, once, probe
from bench.problems import Case
from bench.short_run import Worker

SIZES = probe.Sizes(gemm=32, block=16, width=8, copied=4096, cached=1024)
CASES = {loss: Case(loss, torch.float32, 70, 32) for loss in ("hard", "psd", "psd_teacher")}
# A tool that says what it was asked, runs the program that follows, and adds its verdict.
FAKE = """#!/bin/sh
echo "asked: $*"
while [ "$1" != "{python}" ]; do shift; done
"$@" || exit 1
echo "{verdict}"
exit {code}
"""


@pytest.fixture
def interpreted(tmp_path):
    """Calls a function in a process that interprets kernels, with stand-ins for torch.cuda."""
    worker = Worker(rehearsal.install, {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)})
    yield lambda function, **arguments: worker.call(function, arguments, 300)
    worker.end()


@needs_triton
def test_the_probe_divides_work_by_time(interpreted):
    rows = interpreted(probe.probe, device="cpu", dtype=torch.float32, sizes=SIZES, seconds=0.0)
    assert [row["what"] for row in rows] == [
        "copy", "L2, 0 MiB summed", "32 x 32 x 32", "logits: 32 x 32 x 8", "G @ y: 16 x 8 x 16", "G.T @ x: 16 x 8 x 16"
    ]  # fmt: skip
    amounts = [2 * 4096, 64 * 1024, 10 * 2 * 32**3, 10 * 2 * 32 * 32 * 8, *(2 * [10 * 2 * 16 * 16 * 8])]
    for row, amount in zip(rows, amounts, strict=True):
        assert row["rate"] == pytest.approx(amount / row["s"].median / 1e12)
    assert [row["unit"] for row in rows] == 2 * ["TB/s"] + 4 * ["TFLOP/s"]


@needs_triton
@pytest.mark.parametrize("loss", [pytest.param(loss, marks=[pytest.mark.long] * (loss == "psd")) for loss in CASES])
def test_every_candidate_of_every_kernel_is_timed(interpreted, loss):
    rows, candidates = interpreted(_kernels_and_candidates, case=CASES[loss])
    assert [(row["kernel"], row["candidate"]) for row in rows] == candidates
    assert {"forward", "backward", "products"} <= {row["kernel"] for row in rows}
    for row in rows:
        operations = 4 if loss == "psd_teacher" or row["kernel"] == "products" else 2
        assert row["ps an entry"] > 0 and row["loss"] == loss
        assert row["TFLOP/s"] == pytest.approx(operations * 32 / row["ps an entry"])
        assert row["share of gemm"] == pytest.approx(row["TFLOP/s"] * row["gemm s"] * 1e12 / (2 * 32**3))


def _kernels_and_candidates(case):
    """The tool's rows, and what the library asked the tuner to choose from meanwhile."""
    from softclip_kernels.backends.triton import launch

    asked, choose_shape, choose_product_shape = [], launch.choose_shape, launch.choose_product_shape

    def asked_for_tiles(kind, launch_pass, trial):
        asked.extend((kind, shape.name) for shape in launch.candidates(kind, launch_pass))
        return choose_shape(kind, launch_pass, trial)

    def asked_for_products(problem, *others):
        asked.extend(("products", shape.name) for shape in launch.product_candidates(problem))
        return choose_product_shape(problem, *others)

    launch.choose_shape, launch.choose_product_shape = asked_for_tiles, asked_for_products
    return kernels.kernels(case, gemm=32, seconds=0.0), asked


@needs_triton
def test_a_candidate_that_fails_is_a_row(interpreted):
    rows = interpreted(_kernels_with_a_failure, case=CASES["hard"])
    (failed,) = [row for row in rows if "error" in row]
    assert failed["error"] == "RuntimeError: out of registers" and failed["passed"] is False
    assert failed["candidate"] == "16x16x16w4s1" and failed["kernel"] == "forward" and "s" not in failed
    assert len([row for row in rows if row["kernel"] == "forward" and row.get("ps an entry")]) >= 1


def _kernels_with_a_failure(case):
    from softclip_kernels.backends.triton import launch, shapes

    of = launch.candidates

    def candidates(kind, launch_pass):
        more = (shapes.Shape(16, 16, 16, 4, 1),) if kind == "forward" else ()
        return of(kind, launch_pass) + more

    def choose_shape(kind, launch_pass, trial):
        def failing(shape):
            if shape.block_m == 16:
                raise RuntimeError("out of registers\nand more")
            return trial(shape)

        return choose(kind, launch_pass, failing)

    launch.candidates, choose, launch.choose_shape = candidates, launch.choose_shape, choose_shape
    return kernels.kernels(case, gemm=32, seconds=0.0)


@needs_triton
def test_what_ends_a_pass_leaves_the_rows_before_it(interpreted):
    rows = interpreted(_kernels_and_then_a_failure, case=CASES["hard"])
    assert all(row["ps an entry"] > 0 and row["kernel"] == "forward" for row in rows[:-1]) and len(rows) > 1
    assert rows[-1]["error"] == "RuntimeError: CUDA error: unspecified launch failure" and not rows[-1]["passed"]


def _kernels_and_then_a_failure(case):
    from softclip_kernels.backends.triton import softmax_backward

    def broken(*_):
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    softmax_backward._tuned_launch = broken
    return kernels.kernels(case, gemm=32, seconds=0.0)


def test_a_profiler_that_sees_nothing_is_a_failure(monkeypatch):
    """Without the rights to, it only leaves the kernels out."""
    for name, value in rehearsal.stand_ins().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Case, "fused", lambda case, backend: case.dense())
    monkeypatch.setattr(breakdown, "_events", lambda device, run: iter(()))
    with pytest.raises(RuntimeError, match="the profiler saw no kernel"):
        breakdown.breakdown(CASES["hard"], 0.0)


@needs_triton
def test_a_breakdown_adds_up(interpreted):
    row = interpreted(breakdown.breakdown, case=CASES["hard"], seconds=0.0)
    assert row["kernels"]["aten::empty"][0] > 0  # on a CPU operators stand for kernels
    milliseconds = [ms for _, ms in row["kernels"].values()]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert sum(row["phases"].values()) == pytest.approx(sum(milliseconds))
    assert row["launches"] == pytest.approx(sum(calls for calls, _ in row["kernels"].values()))
    assert row["wall ms"] > 0 and row["host ms"] > 0 and row["gaps ms"] < row["wall ms"]


def test_the_time_covered_counts_overlaps_once():
    assert breakdown.covered([(5, 7), (0, 3), (1, 2), (2, 4)]) == 6


@pytest.mark.parametrize(
    ("kernel", "phase"),
    (
        ("softmax_forward_kernel", "statistics"),
        ("sums_kernel", "statistics"),
        ("softmax_backward_kernel", "G"),
        ("softmax_exchange_kernel", "G"),
        ("products_kernel", "products"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "products"),
        ("sm90_xmma_gemm_bf16f32_bf16f32_f32_nt_n_tilesize128x128x64", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16>", "products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
    ),
)
def test_a_kernel_belongs_to_a_phase(kernel, phase):
    assert breakdown.phase(kernel) == phase


# Two settings.


@pytest.mark.parametrize(
    ("text", "setting"),
    (
        ("new=/tmp", ab.Setting("new", path=Path("/tmp"))),
        ("SOFTCLIP_AUTOTUNE=0", ab.Setting("SOFTCLIP_AUTOTUNE=0", {"SOFTCLIP_AUTOTUNE": "0"})),
        ("128x256x64w8s3", ab.Setting("128x256x64w8s3", {"SOFTCLIP_CANDIDATE": "128x256x64w8s3"})),
        ("forward=a,backward=b", ab.Setting("forward=a,backward=b", {"SOFTCLIP_CANDIDATE": "forward=a,backward=b"})),
    ),
)
def test_a_setting_is_a_tree_a_variable_or_a_candidate(text, setting):
    assert ab.Setting.parse(text) == setting


@needs_cpu_kernels
def test_two_settings_are_timed_in_turns(monkeypatch):
    monkeypatch.setattr(compare, "SHORTEST", 0.0)
    monkeypatch.setattr(compare, "CHECKED", 60)  # the case is larger
    (row,) = ab.ab(ab.Setting("a"), ab.Setting("b", {"OMP_NUM_THREADS": "1"}), CASES["psd"], rounds=2)
    assert (row["base"], row["against"], row["loss"]) == ("a", "b", "psd")
    assert 0 < row["low"] <= row["speedup"] <= row["high"] and row["same bits"] in (True, False)
    assert len(row["base seconds"].seconds) == len(row["against seconds"].seconds) == 4


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("wrong", "error"),
    (("0.9", "other is wrong: psd"), ("(0.9 if len(arguments[0]) == 70 else 1)", "against against base: ")),
)
def test_a_wrong_tree_is_named_and_not_timed(tmp_path, monkeypatch, wrong, error):
    monkeypatch.setattr(compare, "CHECKED", 60)
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("timed"))
    library = tmp_path / "softclip_kernels"
    shutil.copytree(ROOT / "softclip_kernels", library, ignore=shutil.ignore_patterns("__pycache__"))
    with (library / "__init__.py").open("a") as module:
        module.write(
            f"_right = softclip_loss\ndef softclip_loss(*arguments):\n    return {wrong} * _right(*arguments)\n"
        )
    (row,) = ab.ab(ab.Setting("tree"), ab.Setting("other", path=tmp_path), CASES["psd"], rounds=1)
    assert row["passed"] is False and row["error"].startswith(error), row


HANGING = """
import time
Hard = Mix = SelfTeacher = Target = Teacher = lambda *_, **__: None
def softclip_loss(*_): time.sleep(1000)
"""


def test_two_settings_end_in_their_time(tmp_path, monkeypatch):
    """And so do their processes, of which one would never answer."""
    (tmp_path / "softclip_kernels").mkdir()
    (tmp_path / "softclip_kernels" / "__init__.py").write_text(HANGING)
    sides = []

    class Side(compare.Side):
        def __enter__(self):
            sides.append(self)
            return self

    monkeypatch.setattr(ab, "Side", Side)
    start = time.monotonic()
    (row,) = ab.ab(*(ab.Setting(name, path=tmp_path) for name in "ab"), CASES["hard"], limit=15.0)
    assert row["passed"] is False and row["error"] == "not finished after 15 s" and time.monotonic() - start < 40
    assert len(sides) == 2 and all(side._process.poll() is not None for side in sides)


# NVIDIA's programs.


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a stand-in for a program on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(name, verdict, code=0):
        path = tmp_path / name
        path.write_text(FAKE.format(python=sys.executable, verdict=verdict, code=code))
        path.chmod(0o755)

    return make


@needs_triton
def test_ncu_looks_at_one_kernel(program, tmp_path):
    program("ncu", "    Duration          us       12.3")
    row = external.ncu("softmax_forward.*", _passed("hard", tmp_path))
    assert row["installed"] and row["passed"] and row["exit code"] == 0
    assert (row["kernel"], row["loss"]) == ("softmax_forward.*", "hard")
    assert row["outcome"] == "Duration          us       12.3"
    text = Path(row["text"]).read_text()
    assert "asked: --set full --clock-control none -c 1 -k regex:softmax_forward.* " in text and "\nloss " in text


@needs_triton
def test_the_sanitizers_text_stays_where_it_found_something(program, tmp_path):
    program("compute-sanitizer", "========= RACECHECK SUMMARY: 2 hazards displayed", external.WRONG)
    row = external.sanitize("racecheck", _passed("psd", tmp_path))
    assert (row["check"], row["loss"], row["passed"], row["exit code"]) == ("racecheck", "psd", False, external.WRONG)
    assert row["outcome"] == "RACECHECK SUMMARY: 2 hazards displayed"
    text = Path(row["text"]).read_text()
    assert "asked: --tool racecheck --error-exitcode 9 " in text and f" {once.SMALL}\n" in text and "\nloss " in text
    program("compute-sanitizer", "========= RACECHECK SUMMARY: 0 hazards displayed")
    row = external.sanitize("racecheck", _passed("psd", tmp_path))
    assert row["passed"] and "text" not in row and not list(tmp_path.glob("*.txt"))


def _passed(loss, folder):
    return external.Pass(CASES[loss], folder, {"TRITON_INTERPRET": "1"})


def test_a_program_that_is_missing_or_hangs_is_a_row(tmp_path, monkeypatch):
    """What it looks at ends with it."""
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    row = external.ncu("a", _passed("hard", tmp_path))
    assert row["installed"] is False and row["outcome"] == "ncu is not installed" and "passed" not in row
    hanging, child = tmp_path / "ncu", tmp_path / "child"
    hanging.write_text(f"#!/bin/sh\nsleep 100 & echo $! > {child}\nwait\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
    row = external.ncu("a", _passed("hard", tmp_path), limit=1.0)
    assert row["passed"] is False and row["outcome"] == "not finished in time" and row["exit code"] is None
    assert _ended(int(child.read_text()))


def _ended(process):
    """Whether it is gone within a second, or waits for somebody to note that it is."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if status.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
                continue
        return True
    return False
