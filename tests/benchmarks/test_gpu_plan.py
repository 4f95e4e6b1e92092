"""What a run of `python -m bench gpu` consists of: its order, its estimates and goals, and the steps before the timing,
with stand-ins for what only a GPU has."""

from __future__ import annotations

import re
import sys
import zipfile

import pytest
import torch
from helpers.backends import needs_triton

from bench import gpu
from bench.gpu import compilation, goals, products, rehearsal, rivals
from bench.gpu.plan import SIZES, WIDTHS, Scale, plan, schedule
from bench.gpu.run import tuning_lines
from bench.problems import LOSSES, Case
from bench.records import sources
from bench.short_run import Failed
from bench.timing import Timing

SMALL = Case("hard", torch.float32, 33, 16)


@pytest.fixture
def on_a_processor(monkeypatch):
    for name, value in rehearsal.stand_ins().items():
        monkeypatch.setattr(torch.cuda, name, value)


def _planned(*arguments):
    return list(plan(gpu.parse(arguments, Scale()), Scale()))


def test_a_run_begins_with_what_finds_errors_soonest():
    kinds = list(dict.fromkeys(step.kind for step in _planned("--rivals", "wheels")))
    assert kinds == ["smoke", "compilation", "speed", "breakdown", "graph", "tests", "correctness", "memory", "rivals",
                     "compiled", "million", "first call"]  # fmt: skip
    assert "compilation" not in {step.kind for step in _planned("--candidate", "128x256x64w8s3")}


def test_the_plan_fits_in_its_time_and_leaves_no_size_out():
    planned = _planned("--rivals", "wheels")
    assert sum(step.estimate for step in planned if not step.spare) < 60 * Scale.minutes
    assert re.match(r"\d+ s of 510 s", schedule(planned, 510).splitlines()[-1])
    spare = [step.spare for step in planned]
    assert spare == sorted(spare)
    timed = [(step.case.loss, step.case.n, step.case.d) for step in planned if step.kind == "speed"]
    assert len(timed) == len(set(timed)) == 3 * len(SIZES) * len(WIDTHS)
    assert timed[3] == ("hard", *goals.STANDING_SIZE)


def test_results_go_where_the_machine_takes_them_from(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    assert gpu.parse([], Scale()).results is None
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.parse([], Scale()).results == tmp_path
    assert gpu.parse(["--results", "x"], Scale()).results.name == "x"


def test_the_hash_is_of_the_sources_alone(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = sources(tmp_path)
    (tmp_path / "cache.pyc").write_text("anything")
    assert sources(tmp_path) == before
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert sources(tmp_path) != before


def test_the_tuners_choice_is_printed_first():
    measured = {"chosen": "b", "ps an entry": {"a": 2.0, "b": 1.0}, "left out": {"c": "too large"}}
    (line,) = tuning_lines({"forward sm_90": measured})
    assert line == {"kernel and problem": "forward sm_90", "candidates, ps an entry": "b 1, a 2, c left out"}


def test_goals_are_those_of_the_issue():
    row = {"share of gemm": 0.75, "over hard": 1.2, "over eager autocast": 6.0, "over compiled autocast": 2.4}
    assert goals.goals("hard", 32768, 512, row) == {
        "share of gemm >= 0.8": False,
        "over eager autocast >= 5.0": True,
        "over compiled autocast >= 2.5": False,
    }
    assert goals.goals("psd", 16384, 1024, row) == {"over hard <= 1.15": False}
    assert goals.goals("psd_teacher", 16384, 512, row) == {"share of gemm >= 0.7": True}
    assert goals.goals("hard", 4096, 512, row) == {}
    standing = row | {"fused": Timing.of((0.05,))}
    assert goals.goals("hard", *goals.STANDING_SIZE, standing)["fused <= 44 ms"] is False


@pytest.mark.parametrize("loss", LOSSES)
def test_the_phases_goals_add_up_to_the_loss_own(loss):
    case, rate = Case(loss, torch.bfloat16, 32768, 512), 8e14
    allowed = goals.phase_goals(case, rate)
    hard = 8 * 32768**2 * 512 / (0.80 * rate)
    whole = {"hard": hard, "psd": 1.15 * hard, "psd_teacher": 12 * 32768**2 * 512 / (0.70 * rate)}[loss]
    assert sum(allowed.values()) == pytest.approx(1e3 * whole)
    slow = allowed | {"G": 1.01 * allowed["G"]}
    assert list(goals.phases_reached(slow, allowed).values()) == [True, False, True, True]


def test_the_phases_stand_beside_their_goals(on_a_processor, monkeypatch):
    phases = {"statistics": 0.0, "G": 1e9, "products": 0.0, "rest": 0.0}
    monkeypatch.setattr(products, "by_kernel", lambda case: {"phases": phases, "told": case.loss})
    row = products.breakdown(SMALL, 16)
    assert row["told"] == "hard" and row["gemm TFLOP/s"] > 0
    assert list(row["goals"].values()) == [True, False, True, True]


class _Compiler:
    """A worker whose candidates are two kinds' good ones, one that does not compile and, of some losses, a bad one."""

    def __init__(self, prepare, environment):
        pass

    def call(self, function, arguments, seconds):
        if function is compilation.candidates_of:
            return ["forward=good", "forward=large", f"backward={arguments['case'].loss}"]
        if arguments["forced"] == "backward=psd":
            raise Failed("AssertionError: dx differs", assertion=True)
        if arguments["forced"] == "backward=psd_teacher":
            raise Failed("not finished after 30 s")
        return "out of resource" if arguments["forced"] == "forward=large" else ""

    def end(self):
        pass


def test_a_candidate_that_does_not_compile_is_told_and_one_that_is_wrong_or_hangs_fails(monkeypatch):
    monkeypatch.setattr(compilation, "Worker", _Compiler)
    hard, psd, taught = (Case(loss, torch.float32, 33, 16) for loss in LOSSES)
    row = compilation.compile_candidates([hard], None, {}, 60)
    assert row["passed"] and row["outcome"] == "3 candidates, 1 left out (hard forward=large)"
    assert row["left out"] == {"hard forward=large": "out of resource"} and not row["failed"]
    row = compilation.compile_candidates([psd, taught], None, {}, 60)
    assert not row["passed"] and "2 failed (psd backward=psd, psd_teacher backward=psd_teacher)" in row["outcome"]
    assert list(row["failed"].values()) == ["AssertionError: dx differs", "not finished after 30 s"]
    assert row["kept from the tuner"] == ["backward=psd", "backward=psd_teacher"]
    row = compilation.compile_candidates([hard], None, {}, 0)
    assert not row["passed"] and set(row["failed"].values()) == {"no time left"} and len(row["failed"]) == 3


# The softmax loss with memeff's signature, and without a gradient of the temperature.
MEMEFF = """
import torch
from torch.nn.functional import cross_entropy, normalize

class MemoryEfficientCLIPLoss(torch.nn.Module):
    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True):
        super().__init__()
        assert normalized_inputs and not stable
        self.temperature = temperature
        self.size = 1.0

    def forward(self, image_features, text_features):
        z = image_features @ text_features.T / self.temperature
        labels = torch.arange(len(z))
        return self.size * (cross_entropy(z, labels) + cross_entropy(z.T, labels)) / 2
"""


def _forget_rivals(monkeypatch):
    for name in ("inf_cl", "siglip_kernel", "memeff"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def _wheel(folder, package, source):
    with zipfile.ZipFile(folder / f"{package}-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package}.py", source)


def test_rivals_come_from_their_wheels_and_fail_alone(on_a_processor, monkeypatch, tmp_path):
    monkeypatch.setattr(Case, "fused", lambda case, backend: case.dense())
    _forget_rivals(monkeypatch)
    row = rivals.compare(SMALL, tmp_path, 1)
    assert all(row[name].startswith("failed: ModuleNotFoundError") for name in rivals.RIVALS)
    _wheel(tmp_path, "memeff", MEMEFF)
    (tmp_path / "broken.whl").write_text("half of a download")
    _wheel(tmp_path, "inf_cl", "def cal_flash_loss(x, y, scale): raise RuntimeError('no kernel')\n")
    _wheel(tmp_path, "siglip_kernel", "def fused_siglip_loss(x, y, t, b): return (t.exp() * x * y + b).sum()\n")
    row = rivals.compare(SMALL, tmp_path, 1)
    assert row["inf-cl"] == "failed: RuntimeError: no kernel"
    assert row["broken.whl"] == "failed: BadZipFile: File is not a zip file"
    assert row["over siglip-kernel"] > 0 and row["over memeff"] > 0 and row["fused"].median > 0
    _forget_rivals(monkeypatch)


def test_memeff_is_not_timed_with_gradients_of_another_size(on_a_processor, monkeypatch, tmp_path):
    monkeypatch.setattr(Case, "fused", lambda case, backend: case.dense())
    _forget_rivals(monkeypatch)
    _wheel(tmp_path, "memeff", MEMEFF.replace("self.size = 1.0", "self.size = 1.05"))
    row = rivals.compare(SMALL, tmp_path, 1)
    assert row["memeff"].startswith("failed: AssertionError: dx differs from the fused loss by 5.0e-02")
    assert "over memeff" not in row
    _forget_rivals(monkeypatch)


@needs_triton
def test_the_candidates_are_those_the_library_asks_its_tuner_for(monkeypatch):
    """A pass without kernels stands for one on a GPU."""
    from softclip_kernels.backends.triton import tuning
    from softclip_kernels.backends.triton.shapes import Shape

    shapes = (Shape(32, 64, 32, 4, 1), Shape(64, 64, 32, 4, 1))

    def fused(case, backend):
        def loss(x, y, scale):
            for kind in ("forward", "backward"):
                tuning.choose(kind, str, shapes, None, 0, x.device)
            return case.dense()(x, y, scale)

        return loss

    monkeypatch.setattr(Case, "fused", fused)
    found = compilation.candidates_of(SMALL)
    assert found == [f"{kind}={shape.name}" for kind in ("forward", "backward") for shape in shapes]
    assert [compilation.run_candidate(SMALL, forced) for forced in found] == [""] * len(found)
    with pytest.raises(ValueError, match="does not suit"):
        compilation.run_candidate(SMALL, "forward=9x9x9w9s9")


@needs_triton
@pytest.mark.parametrize("broken", (False, True))
def test_a_candidate_that_cannot_be_launched_is_left_out_unless_it_breaks_the_device(
    on_a_processor, monkeypatch, broken
):
    def fused(case, backend):
        def loss(x, y, scale):
            raise RuntimeError("Triton Error [CUDA]: out of resource: shared memory\nmore")

        return loss

    def synchronize():
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Case, "fused", fused)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    if broken:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            compilation.run_candidate(SMALL, "forward=a")
    else:
        assert compilation.run_candidate(SMALL, "forward=a") == "Triton Error [CUDA]: out of resource: shared memory"


@needs_triton
def test_a_candidate_that_no_kernel_has_is_refused_before_anything_runs(capsys):
    """The tuner would take another one, under its name."""
    for wrong, *flags in (
        ("64x32x32w4s9", "--candidate", "64x32x32w4s9"),
        ("typo", "--candidate", "forward=32x64x32w4s1,products=typo"),
        ("/no/such/tree", "--ab", "32x64x32w4s1", "other=/no/such/tree"),
    ):
        with pytest.raises(SystemExit) as refused:
            gpu.main(["--rehearse", *flags])
        told = capsys.readouterr()
        assert refused.value.code == 2 and not told.out and f"no kernel has a candidate {wrong};" in told.err
        assert "32x64x32w4s1-tma" in told.err
        assert "32x64x32w4s1-exchange" in told.err and "128x128x64w8s3-library" in told.err
