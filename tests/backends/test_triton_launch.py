"""What the Triton backend does between a problem and a launch, without a GPU: arguments in order, the choice of tiles
and its file, the precision of fp32 products."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from helpers import PYTHONPATH, ROOT
from helpers.backends import needs_triton

pytestmark = needs_triton

GPU = torch.device("cuda")
LARGE = 2**30  # entries


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """The module with an empty memory, a file of its own and a GPU that is never captured and survives every error."""
    from softclip_kernels.backends.triton import tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SOFTCLIP_AUTOTUNE", raising=False)
    monkeypatch.delenv("SOFTCLIP_CANDIDATE", raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_measurements", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return tuning


def a():
    """A case of problems, as tuning.choose asks for it."""
    return "a"


def b():
    return "b"


def key(case):
    return f"forward {case} of {' '.join(shape.name for shape in shapes())}"


def shapes():
    from softclip_kernels.backends.triton.shapes import candidates

    suitable = candidates("forward", "none", True, 2, "sm_90")[:5]
    assert len(suitable) == 5
    return suitable


class Timer:
    """Stands for the GPU: the index of the shape of the last trial gives the time, and trials are counted."""

    def __init__(self, monkeypatch, tuning, seconds, failing=(), error=None):
        from triton.runtime.errors import OutOfResources

        self.seconds, self.failing, self.trials, self.index = seconds, failing, 0, 0
        self.error = error or OutOfResources(300_000, 232_448, "shared memory")
        monkeypatch.setattr(tuning, "measure", lambda launch: self.seconds[self.index])

    def trial(self, shape):
        self.trials += 1
        self.index = shapes().index(shape)
        if self.index in self.failing:
            raise self.error
        return (lambda: None), 1


def test_the_fastest_shape_is_taken_and_measured_once(tuning, monkeypatch, caplog):
    timer = Timer(monkeypatch, tuning, (4.0, 3.0, 1.0, 2.0, 5.0))
    with caplog.at_level(logging.INFO, "softclip_kernels"):
        assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[2]
        assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[2]
    assert timer.trials == len(shapes())
    assert len(caplog.messages) == 1 and "measured" in caplog.messages[0]
    tuning._chosen.clear()  # another process
    assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[2]
    assert timer.trials == len(shapes())
    assert tuning.choose("forward", b, shapes(), timer.trial, LARGE, GPU) == shapes()[2]
    assert timer.trials == 2 * len(shapes())
    assert set(json.loads(tuning.path().read_text())["tiles"]) == {key("a"), key("b")}


def test_what_was_timed_can_be_asked_for(tuning, monkeypatch):
    timer = Timer(monkeypatch, tuning, (4.0, 3.0, 1.0, 2.0, 5.0), failing=(0,))
    names = [shape.name for shape in shapes()]
    assert tuning.measurements() == {}
    tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU)
    tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU)
    (measured,) = tuning.measurements().items()
    assert measured[0] == key("a") and measured[1]["chosen"] == names[2]
    assert measured[1]["ps an entry"] == dict(zip(names[1:], (3e12, 1e12, 2e12, 5e12), strict=True))
    assert measured[1]["left out"].keys() == {names[0]} and "shared memory" in measured[1]["left out"][names[0]]
    json.dumps(measured)


def device_error(message):
    """torch's own, which has a class from torch 2.8 on."""
    return getattr(torch, "AcceleratorError", RuntimeError)(f"CUDA error: {message}")


@pytest.mark.parametrize(
    "error",
    (
        None,
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        RuntimeError("Triton Error [HIP]: invalid argument"),
        RuntimeError("PassManager::run failed"),
        pytest.param(
            device_error("invalid configuration argument"),
            marks=pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no such class"),
        ),
    ),
    ids=str,
)
def test_shapes_that_fail_are_left_out(tuning, monkeypatch, caplog, error):
    timer = Timer(monkeypatch, tuning, (4.0, 3.0, 1.0, 2.0, 5.0), (2, 0), error)
    with caplog.at_level(logging.INFO, "softclip_kernels"):
        assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[3]
    assert [shapes()[2].name in message for message in caplog.messages if "left out" in message] == [False, True]
    timer.failing = range(5)
    assert tuning.choose("forward", b, shapes(), timer.trial, LARGE, GPU) == shapes()[0]


def test_an_error_that_is_not_the_shapes_own_is_raised(tuning, monkeypatch):
    """Of the host's, or one that leaves the device unusable, as every later call then says too."""
    timer = Timer(monkeypatch, tuning, (1.0,) * 5, (1,), RuntimeError("CPU dispatcher tracing NYI"))
    with pytest.raises(RuntimeError, match="tracing"):
        tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU)

    def unusable():
        raise device_error("an illegal memory access was encountered")

    timer.error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "synchronize", unusable)
    with pytest.raises(RuntimeError, match="illegal memory access") as raised:
        tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU)
    assert raised.value.__context__ is timer.error
    assert tuning.measurements() == {} and not tuning.path().exists()


def test_a_candidate_that_is_asked_for_is_taken_without_timing(tuning, monkeypatch):
    timer = Timer(monkeypatch, tuning, (1.0, 2.0, 3.0, 4.0, 5.0))
    third, fourth = (shapes()[index] for index in (2, 3))

    def choose(kind, suitable=None, entries=LARGE, device=GPU):
        return tuning.choose(kind, a, suitable or shapes(), timer.trial, entries, device)

    for kind, device, entries in (("forward", GPU, LARGE), ("backward", torch.device("cpu"), 1)):
        monkeypatch.setenv("SOFTCLIP_CANDIDATE", third.name)
        assert choose(kind, entries=entries, device=device) == third
        monkeypatch.setenv("SOFTCLIP_CANDIDATE", f"{kind}={fourth.name}, products={third.name}")
        assert choose(kind, entries=entries, device=device) == fourth
    assert timer.trials == 0 and not tuning.path().exists()
    # A bare name means the kinds that have it; one of a kind is meant for no other.
    monkeypatch.setenv("SOFTCLIP_CANDIDATE", third.name)
    assert choose("forward", [fourth]) == fourth
    monkeypatch.setenv("SOFTCLIP_CANDIDATE", f"backward={third.name}")
    assert choose("forward") == shapes()[0] and timer.trials == len(shapes())
    with pytest.raises(ValueError, match=f"SOFTCLIP_CANDIDATE=.*{third.name}.*backward.*{fourth.name}"):
        choose("backward", [fourth])


def test_a_candidate_that_nobody_has_is_an_error(tuning, monkeypatch):
    """A slip of the pen, not a candidate of another kind of kernel or another architecture."""
    timer = Timer(monkeypatch, tuning, (1.0, 2.0, 3.0, 4.0, 5.0))
    monkeypatch.setenv("SOFTCLIP_CANDIDATE", "128x64x64w8s2")  # sm_80's
    assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[0]
    monkeypatch.setenv("SOFTCLIP_CANDIDATE", "128x256x64w8s33")
    with pytest.raises(ValueError, match=f"SOFTCLIP_CANDIDATE=128x256x64w8s33.*forward.*{shapes()[0].name}"):
        tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU)
    monkeypatch.setenv("SOFTCLIP_CANDIDATE", f"forwards={shapes()[0].name}")
    with pytest.raises(ValueError, match="no kind 'forwards'; there are forward, backward, products"):
        tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU)


def test_a_choice_is_remembered_with_what_it_was_made_from(tuning, monkeypatch):
    """Operands that do not suit every candidate, such as rows that overlap, have a choice of their own."""
    timer = Timer(monkeypatch, tuning, (4.0, 3.0, 1.0, 2.0, 5.0))
    for _ in range(2):
        assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[2]
        assert tuning.choose("forward", a, shapes()[:2], timer.trial, LARGE, GPU) == shapes()[1]
    assert timer.trials == len(shapes()) + 2


def test_nothing_is_timed_where_it_must_not_be(tuning, monkeypatch):
    timer = Timer(monkeypatch, tuning, (5.0, 4.0, 3.0, 2.0, 1.0))
    assert tuning.choose("forward", a, shapes(), timer.trial, 1000, GPU) == shapes()[0]
    assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, torch.device("cpu")) == shapes()[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("SOFTCLIP_AUTOTUNE", "0")
    assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[0]
    assert timer.trials == 0 and not tuning.path().exists()
    monkeypatch.delenv("SOFTCLIP_AUTOTUNE")
    assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[4]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[4]


@pytest.mark.parametrize(
    "content",
    (
        b"\xff\xfe not text",
        b"{",
        b"[]",
        b'{"format": 99, "tiles": {}}',
        b'{"format": 1, "tiles": {"forward a": [128, 256, 64, 8, 3]}}',  # a candidate, under a key of another meaning
        b'{"format": 4, "tiles": [1]}',
        b'{"format": 4, "tiles": {"KEY": "1x2x3w4s5"}}',
        b'{"format": 4, "tiles": {"KEY": {"name": "256x128x64w8s3"}}}',
    ),
)
def test_a_poisoned_file_is_ignored_and_replaced(tuning, monkeypatch, caplog, content):
    timer = Timer(monkeypatch, tuning, (4.0, 3.0, 1.0, 2.0, 5.0))
    tuning.path().parent.mkdir()
    tuning.path().write_bytes(content.replace(b"KEY", key("a").encode()))
    with caplog.at_level(logging.INFO, "softclip_kernels"):
        assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[2]
    assert any("ignored" in message for message in caplog.messages)
    assert json.loads(tuning.path().read_text())["tiles"] == {key("a"): shapes()[2].name}


def test_a_folder_that_cannot_be_written_is_no_error(tuning, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    timer = Timer(monkeypatch, tuning, (4.0, 3.0, 1.0, 2.0, 5.0))
    assert tuning.choose("forward", a, shapes(), timer.trial, LARGE, GPU) == shapes()[2]


def _write_many(cache, name):
    os.environ["XDG_CACHE_HOME"] = cache
    from softclip_kernels.backends.triton import tuning

    for index in range(50):
        tuning._to_file(f"{name} {index}", shapes()[0])


def test_two_processes_that_write_at_once_leave_a_whole_file(tuning, tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), name)) for name in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if tuning.path().exists():
            assert json.loads(tuning.path().read_text())["format"] == 4
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(tuning._read()) >= 50
    assert [file.name for file in tuning.path().parent.iterdir()] == ["tiles.json"]


LAUNCHES = """
import os, sys, torch
from helpers import undriven
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

def checked(kernel, signature):
    # What the ordinary launch makes of the arguments is what the table beside the kernel says.
    module = sys.modules[kernel.fn.__module__]
    dtypes = {"*student": "*bf16", "*teacher": "*bf16", "*grad": "*bf16", "*previous?": "*fp32", "*grad?": "*bf16"}
    if signature.get("previous", "constexpr") == "constexpr" and "previous" in signature and len(problem.teachers) > 1:
        dtypes["*grad"] = "*fp32"  # the first of several teachers
    for name, kind in module.ARGUMENTS.items():
        absent = kind.endswith("?") or kind == "i32 step"
        expected = dtypes.get(kind, kind.removesuffix("?").split()[0])
        if kind.startswith("box"):
            sides = {"box rows": [128, 64], "box columns": [256, 64], "box tile": [128, 256]}[kind]
            expected = f"tensordesc<bf16{sides}>"
        assert signature[name] == expected or absent and signature[name] == "constexpr", (name, kind, signature[name])
    assert all(of == "constexpr" for name, of in signature.items() if name not in module.ARGUMENTS)

undriven.install(checked)
noted, compiled = undriven.noted, undriven.compiled
from softclip_kernels.backends.triton import call, edges, launch
from softclip_kernels.backends.triton.softmax_backward import backward
from softclip_kernels.backends.triton.softmax_forward import forward
from softclip_kernels.problem import Problem, TeacherOperand, Source
from softclip_kernels.stats import StatisticsGradient, Wanted
launch.SCRATCH, edges.most = 2**21, lambda: 2**21

def run(problem):
    noted.clear()
    statistics = forward(problem)
    k = len(problem.teachers)
    n, m = problem.rows, problem.columns
    gradient = StatisticsGradient(torch.ones(1 + k, n), torch.ones(1 + k, m), torch.zeros(n))
    backward(problem, statistics, gradient, Wanted(rounded=True))
    return [(name, grid, tuple(map(plain, arguments))) for name, grid, arguments in noted]

def plain(value):
    if isinstance(value, TensorDescriptor):
        of = {x.data_ptr(): "x", y.data_ptr(): "y"}.get(value.base.data_ptr(), "scratch")
        return of, *value.shape, *value.strides, *value.block_shape
    return "pointer" if isinstance(value, torch.Tensor) or isinstance(value, int) and value > 2**32 else value

n = 2500
x, y = (torch.zeros(n, 64, dtype=torch.bfloat16) for _ in range(2))
pair = TeacherOperand(Source.TRANSPOSED)
external = TeacherOperand(Source.EMBEDDINGS, torch.tensor(5.0), x, y, None, torch.zeros(n))
persistent = "128x256x64w8s3-tma"
for tile, teachers in (("", ()), (persistent, ()), ("", (pair,)), ("", (external, external))):
    os.environ["SOFTCLIP_CANDIDATE"] = tile
    problem = Problem(x, y, torch.tensor(10.0), torch.arange(n), teachers=teachers)
    fast = run(problem)
    count = len(compiled)
    assert run(problem) == fast and len(compiled) == count  # another call of the loss
    call.CompiledKernel = type(None)  # every launch the ordinary way
    call._compiled.clear()
    assert run(problem) == fast and len(compiled) == count
    call.CompiledKernel = CompiledKernel
    way = "_persistent" if tile else ""
    assert sum(name == f"softmax_backward{way}_kernel" for name, *_ in fast) >= 3
    assert sum(name == f"softmax_forward{way}_kernel" for name, *_ in fast) >= 1
print("same", compiled and len(compiled))
"""


def test_later_super_blocks_are_launched_as_the_first_is():
    """The same kernels with the same arguments, and nothing compiled again for a super-block."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("same")


def test_ways_that_do_not_suit_a_pass_are_not_offered(monkeypatch):
    from softclip_kernels.backends.triton import launch, norms, passes, scalars
    from softclip_kernels.problem import Problem, Source, TeacherOperand

    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    for module in (norms, scalars):
        monkeypatch.setattr(module, "Call", lambda *_: lambda programs: None)
    x, y = torch.zeros(2, 16, 64, dtype=torch.bfloat16)
    bias, one = torch.zeros(16), torch.ones(())

    def ways(x, *teachers):
        """A list for each launch of the backward pass, after one for the first of the forward pass."""
        each, _ = passes.passes(Problem(x, y, one, torch.arange(16), teachers=teachers))
        lists = [launch.candidates("forward", each[0]), *(launch.candidates("backward", one) for one in each)]
        return [{shape.way for shape in shapes} for shapes in lists]

    teacher, swapped = TeacherOperand(Source.EMBEDDINGS, one, x, y), TeacherOperand(Source.TRANSPOSED)
    assert ways(x) == [{"", "tma"}] * 2
    assert ways(x[:1].expand(16, 64)) == [{""}] * 2  # a descriptor's rows do not overlap
    assert ways(x, teacher) == [{""}, {"", "split"}]
    assert ways(x, teacher, teacher) == [{""}, {"", "split"}, {""}]  # the second has no student's part to split off
    assert ways(x, swapped) == [{"", "pair"}, {"", "exchange"}]
    for name in ("row_bias", "column_bias"):  # beside which pair and split spill
        biased = [dataclasses.replace(each, **{name: bias}) for each in (teacher, swapped)]
        assert [ways(x, each) for each in biased] == [[{""}, {""}], [{""}, {"", "exchange"}]]


@pytest.mark.parametrize("rounded", (False, True))
def test_logits_whose_ranks_are_counted_are_not_rounded(monkeypatch, rounded):
    """One tf32 product rounds a hundred times more than the thresholds of ranks allow for; the same in both passes and
    for every teacher, because a loss of logits in two precisions is biased."""
    from softclip_kernels.backends.triton import launch, norms, passes, scalars
    from softclip_kernels.problem import Problem, Source, TeacherOperand

    problem = Problem(
        *(torch.zeros(4, 64) for _ in range(2)),
        torch.tensor(10.0),
        torch.arange(4),
        teachers=(TeacherOperand(Source.LOGITS), TeacherOperand(Source.TRANSPOSED)),
    )
    ranked = dataclasses.replace(problem, row_threshold=torch.zeros(4), column_threshold=torch.zeros(4))
    monkeypatch.setattr(scalars, "Call", lambda *_: lambda programs: None)
    monkeypatch.setattr(norms, "Call", lambda *_: lambda programs: None)
    expected = {False: passes.passes(problem)[0], True: passes.passes(ranked)[0]}
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(launch.precision, "rounds_operands", lambda device: rounded)
    for counts, launch_passes in expected.items():
        for launch_pass in launch_passes:
            chosen = launch.constants(launch_pass, shapes()[0])["PRECISION"]
            assert chosen == ("tf32" if rounded and not counts else "tf32x3")
