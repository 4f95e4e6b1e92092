"""The CUDA kernels as candidates of the Triton backend's tuner, without a GPU (helpers/posed.py): for which passes they
are offered, and why not for others. What they launch then is in test_sm90_launch.py."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import torch
from helpers.backends import needs_triton
from helpers.posed import OWN_LOGITS, SCALED, SWAPPED, embeddings, own_teacher, passes_of, problem

from softclip_kernels.backends.cuda import Unavailable, kernels
from softclip_kernels.backends.cuda.nvrtc import CompileError

pytestmark = needs_triton


def why_not(kind, of):
    from softclip_kernels.backends.triton import sm90

    return sm90.why_not(kind, passes_of(of)[0])


# For which passes.


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    ("of", "files"),
    (
        ({}, {"forward": {"softmax_forward": [{"PAIR": "0"}]}, "backward": {"softmax_backward": [{"MIRROR": "0"}]}}),
        (
            {"teachers": "swapped"},
            {
                "forward": {"softmax_forward_pair": [{"PAIR": "1", "MIRROR": "1"}]},
                "backward": {"softmax_backward": [{"MIRROR": "1", "TIED": "1"}]},
            },
        ),
        ({"teachers": "scaled"}, {"backward": {"softmax_backward": [{"MIRROR": "1", "TIED": "0"}]}}),
        (
            {"teachers": "own"},
            {
                "forward": {"softmax_forward_pair": [{"PAIR": "1", "MIRROR": "0"}]},
                "backward": {"softmax_backward": [{"FACTOR": "1"}, {"FACTOR": "3", "BOUND": "4"}]},
            },
        ),
        (
            {"teachers": "narrow"},
            {"backward": {"softmax_backward": [{"WIDTH": "128", "MIRROR": "0"}, {"WIDTH": "64", "MIRROR": "0"}]}},
        ),
        ({"d": 512}, {"forward": {"softmax_forward": [{"WIDTH": "512"}]}}),
    ),
    ids=("hard", "swapped", "swapped, of another scale", "own teacher", "narrow teacher", "wide"),
)
def test_what_suits_is_compiled_and_offered(hopper, of, files, dtype):
    named = {
        "swapped": SWAPPED,
        "scaled": SCALED,
        "own": own_teacher(d=128, dtype=dtype),
        "narrow": own_teacher(dtype=dtype),
    }
    given = problem(dtype=dtype, **(of | {"teachers": (named[of["teachers"]],)} if "teachers" in of else of))
    for kind, expected in files.items():
        hopper.compiler.compiled.clear()
        assert why_not(kind, given) is None
        compiled = hopper.compiler.compiled
        assert [name for name, _ in compiled] == [f"{name}.cu" for name, each in expected.items() for _ in each]
        for (_, macros), wanted in zip(
            compiled, (macros for each in expected.values() for macros in each), strict=True
        ):
            assert wanted.items() <= macros.items() and ("HALF" in macros) == (dtype == torch.float16)
            assert all(name in macros for name in ("STAGES", "FACTOR", "BOUND", "HEADROOM"))


WHOLE_ROWS = "segments nor ranks, and rows that are apart, of whole steps of 64"
UNSUITABLE = {
    "fp32": ("forward", {"dtype": torch.float32}, "bfloat16 or float16"),
    "a teacher in another dtype": ("backward", {"teachers": (own_teacher(dtype=torch.float16),)}, "one dtype for all"),
    "a wide one": ("forward", {"d": 576}, "widths up to 512"),
    "a wide teacher": ("backward", {"teachers": (own_teacher(d=1024),)}, "widths up to 512"),
    "a ragged width": ("backward", {"d": 100}, WHOLE_ROWS),
    "segments": (
        "forward",
        {"row_segment": torch.zeros(300, dtype=torch.int64), "column_segment": torch.zeros(300, dtype=torch.int64)},
        WHOLE_ROWS,
    ),
    "ranks": ("forward", {"row_threshold": torch.zeros(300), "column_threshold": torch.zeros(300)}, WHOLE_ROWS),
    "row biases": ("backward", {"teachers": (own_teacher(row_bias=torch.zeros(300)),)}, "without biases"),
    "column biases": (
        "backward",
        {"teachers": (dataclasses.replace(SWAPPED, column_bias=torch.zeros(300)),)},
        "without biases",
    ),
    "several teachers": ("backward", {"teachers": (own_teacher(), own_teacher())}, "one teacher at most"),
    "the student's own logits": ("backward", {"teachers": (OWN_LOGITS,)}, "no backward pass .* from: logits"),
    "the exact path": ("online", {}, "no online pass"),
    "a forward pass with a narrow teacher": (
        "forward",
        {"teachers": (own_teacher(),)},
        "teacher of the student's width",
    ),
    "a forward pass with another scale": ("forward", {"teachers": (SCALED,)}, "of the student's scale"),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_what_does_not_suit_is_not_offered_and_says_why(hopper, monkeypatch, case):
    from softclip_kernels.backends.triton import launch as triton_launch

    kind, of, reason = UNSUITABLE[case]
    assert re.search(reason, why_not(kind, problem(**of)))
    monkeypatch.setenv("SOFTCLIP_CUDA", "1")  # asks for them where they are offered, no further
    assert re.search(reason, why_not(kind, problem(**of)))
    if kind != "online":
        assert all(shape.way != "sm90" for shape in triton_launch.candidates(kind, passes_of(problem(**of))[0]))
    assert hopper.compiler.compiled == []


@pytest.mark.parametrize(
    ("of_x", "reason"),
    (
        (lambda x: x[:1].expand_as(x), WHOLE_ROWS),  # one row
        (lambda x: torch.zeros(300 * 64 + 64 * 2, dtype=x.dtype).as_strided(x.shape, (64, 1)), WHOLE_ROWS),
        (lambda x: torch.cat([x, x[:, :8]], 1)[:, :128], WHOLE_ROWS),  # rows 17 x 16 bytes apart
        (lambda x: torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view_as(x), WHOLE_ROWS),
        (lambda x: x.T.contiguous().T, WHOLE_ROWS),
    ),
    ids=("one row", "overlapping", "apart by half a step", "shifted", "transposed"),
)
def test_rows_that_do_not_stream_are_not_offered(hopper, of_x, reason):
    given = problem()
    assert re.search(reason, why_not("backward", dataclasses.replace(given, x=of_x(given.x))))
    teacher = dataclasses.replace(own_teacher(d=128), x=of_x(embeddings(300, 128)))
    assert re.search(reason, why_not("backward", problem(teachers=(teacher,))))


# Where they cannot run.


def unavailable(reason):
    def raising():
        raise Unavailable(reason)

    return raising


CANNOT = {
    "an older GPU": ("get_device_capability", lambda device: (8, 0), "this GPU has 8.0"),
    "no driver": ("driver", unavailable("there is no NVIDIA driver"), "there is no NVIDIA driver"),
    "no compiler": ("nvrtc", unavailable("there is no compiler (NVRTC)"), "there is no compiler"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_a_machine_that_cannot_falls_back_and_raises_where_they_are_asked_for(hopper, monkeypatch, case):
    from softclip_kernels.backends.triton import launch as triton_launch

    name, value, reason = CANNOT[case]
    monkeypatch.setattr(torch.cuda if name.startswith("get") else kernels, name, value)
    (one,) = passes_of(problem())
    assert reason in why_not("forward", problem())
    monkeypatch.setenv("SOFTCLIP_CANDIDATE", "sm90")
    assert all(shape.way != "sm90" for shape in triton_launch.candidates("forward", one))
    monkeypatch.setenv("SOFTCLIP_CUDA", "1")
    with pytest.raises(RuntimeError, match=rf"SOFTCLIP_CUDA=1 asks for the CUDA kernels.*{re.escape(reason)}"):
        triton_launch.candidates("forward", one)


def test_another_architecture_is_an_error_where_they_are_asked_for(hopper, monkeypatch):
    from softclip_kernels.backends.triton import launch as triton_launch

    monkeypatch.setattr(triton_launch, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setenv("SOFTCLIP_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"SOFTCLIP_CUDA=1 asks for the CUDA kernels.*this GPU has 8\.0"):
        triton_launch.candidates("forward", passes_of(problem())[0])


def test_they_can_be_turned_off(hopper, monkeypatch):
    from softclip_kernels.backends.triton import launch as triton_launch

    monkeypatch.setenv("SOFTCLIP_CUDA", "0")
    monkeypatch.setenv("SOFTCLIP_CANDIDATE", "sm90")
    assert why_not("forward", problem()) == "SOFTCLIP_CUDA=0 turns them off"
    assert all(shape.way != "sm90" for shape in triton_launch.candidates("forward", passes_of(problem())[0]))


def test_another_gpu_asks_nothing(hopper, monkeypatch):
    from softclip_kernels.backends.triton import launch as triton_launch

    monkeypatch.setattr(triton_launch, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(kernels, "why_not", lambda device: pytest.fail("asked"))
    monkeypatch.setenv("SOFTCLIP_CANDIDATE", "sm90")
    assert all(shape.way != "sm90" for shape in triton_launch.candidates("forward", passes_of(problem())[0]))


def test_small_problems_compile_nothing(hopper, monkeypatch):
    """Unless they are asked for, by either variable."""
    from softclip_kernels.backends.triton import launch as triton_launch
    from softclip_kernels.backends.triton import tuning

    def ways():
        return [shape.way for shape in triton_launch.candidates("forward", passes_of(problem())[0])]

    assert "sm90" not in ways() and hopper.compiler.compiled == []
    for name, value in (("SOFTCLIP_CUDA", "1"), ("SOFTCLIP_CANDIDATE", "forward=sm90")):
        monkeypatch.setenv(name, value)
        assert ways()[-1] == "sm90"
        monkeypatch.delenv(name)
    monkeypatch.setattr(tuning, "WORTHWHILE", 300**2)
    assert ways()[-1] == "sm90" and ways().count("sm90") == 1
    monkeypatch.setenv("SOFTCLIP_AUTOTUNE", "0")
    assert "sm90" not in ways()


def failing(error):
    def compile(*_):
        failing.count += 1
        raise error

    failing.count = 0
    return compile


def test_a_kernel_that_does_not_compile_is_named_once(hopper, monkeypatch, caplog):
    hopper.compiler.compile = failing(CompileError("nvrtcCompileProgram failed\nline 3"))
    with caplog.at_level(logging.WARNING, "softclip_kernels"):
        for _ in range(3):
            assert why_not("forward", problem()) == "nvrtcCompileProgram failed"
    assert failing.count == 1 and len(caplog.messages) == 1
    assert "softmax_forward is left out" in caplog.messages[0] and "line 3" in caplog.messages[0]
    assert why_not("backward", problem()) is not None and failing.count == 2  # another kernel
    monkeypatch.setenv("SOFTCLIP_CUDA", "1")
    for d in (64, 128):  # one that has not failed yet, and one that has
        with pytest.raises(CompileError):
            why_not("forward", problem(d=d))


def test_a_module_that_does_not_load_is_left_out(hopper):
    hopper.fails["cuModuleLoadData"] = 200
    assert "cuModuleLoadData failed: CUDA_ERROR_INVALID_IMAGE" in why_not("forward", problem())


def test_nothing_is_compiled_while_a_graph_is_captured(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for kind in ("forward", "backward"):
        assert "being captured" in why_not(kind, problem())
    assert hopper.compiler.compiled == [] and hopper.modules == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert why_not("forward", problem()) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert why_not("forward", problem()) is None and "being captured" in why_not("backward", problem())
