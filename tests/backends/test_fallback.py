"""A slower fallback is never silent: what `auto` takes and what it warns of, with and without a GPU's operands, triton
and the CPU build."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from helpers.backends import needs_cpu_kernels

from softclip_kernels import SlowerBackendWarning, SoftClipLoss, backends, info, softclip_loss
from softclip_kernels.backends import cpu, triton
from softclip_kernels.problem import Problem
from softclip_kernels.testing import unit_rows
from train import auto


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that has not warned of anything."""
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def missing(monkeypatch, *names):
    """Present or absent whatever this machine has."""
    monkeypatch.setattr(triton, "_installed", lambda: "triton" not in names)
    there = SimpleNamespace(environment=lambda *names: tuple(map(os.environ.get, names)), borrow_threads=bool)
    monkeypatch.setattr(cpu, "_cpu", None if "cpu" in names else there)
    monkeypatch.setattr(cpu, "_LEVELS", [] if "cpu" in names else ["portable"])
    monkeypatch.setattr(cpu, "_MISSING", "its extension is not there" if "cpu" in names else None)


def warned(function):
    """What the function returned, and the messages of its warnings, whatever the filters have shown before."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(one.message) for one in caught if issubclass(one.category, SlowerBackendWarning)]


def operand(device, dtype):
    """Embeddings as far as a choice looks at them: no GPU is needed for a GPU's."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, is_cuda=device == "cuda", shape=(4, 8))


# Device, dtype, what is missing: the backend, and the one whose absence slows the loss down (none: no warning).
MATRIX = (
    ("cpu", torch.float32, (), "cpu", None),
    ("cpu", torch.bfloat16, (), "cpu", None),
    ("cpu", torch.float32, ("triton",), "cpu", None),
    ("cpu", torch.float32, ("cpu",), "chunked", "cpu"),
    ("cpu", torch.float32, ("cpu", "triton"), "chunked", "cpu"),
    ("cpu", torch.float16, (), "chunked", "cpu"),
    ("cpu", torch.float64, (), "chunked", "cpu"),
    ("cuda", torch.float32, (), "triton", None),
    ("cuda", torch.float16, ("cpu",), "triton", None),
    ("cuda", torch.float64, (), "chunked", "triton"),
    ("cuda", torch.float32, ("triton",), "chunked", "triton"),
    ("cuda", torch.bfloat16, ("cpu", "triton"), "chunked", "triton"),
    ("mps", torch.float32, (), "chunked", None),  # no backend has kernels for it
)


@pytest.mark.parametrize(("device", "dtype", "absent", "expected", "slower_than"), MATRIX)
def test_matrix(device, dtype, absent, expected, slower_than, monkeypatch):
    missing(monkeypatch, *absent)
    x = operand(device, dtype)
    problem = Problem(x, x, torch.ones(()))
    chosen, messages = warned(lambda: [backends.select("auto", problem).name for _ in range(3)])
    assert chosen == [expected] * 3
    assert len(messages) == (slower_than is not None), "once a process, not once a call"
    for message in messages:
        for word in (f"{expected!r}, slower than {slower_than!r}", "softclip_kernels.info", f"backend={expected!r}"):
            assert word in message
        assert backends.registered()[slower_than].why_not(problem) in message
    _, named = warned(lambda: backends.select(expected, problem))
    assert not named, "a backend that was asked for is no fallback"


def test_every_reason_is_a_warning_of_its_own(monkeypatch):
    missing(monkeypatch)
    half, double = (
        Problem(x, x, torch.ones(())) for x in (operand("cpu", torch.float16), operand("cpu", torch.double))
    )
    _, messages = warned(lambda: [backends.select("auto", one) for one in (half, double, half, double)])
    assert len(messages) == 2 and "not float16" in messages[0] and "not float64" in messages[1]


def test_compiled_calls_warn_too(monkeypatch):
    """The choice is made within the operator, which torch.compile does not look into."""
    x = unit_rows(4, 3)
    loss = torch.compile(softclip_loss, fullgraph=True, backend="aot_eager")
    _, messages = warned(lambda: [loss(x, x, torch.ones(())) for _ in range(3)])
    assert len(messages) == 1 and "not float64" in messages[0]


def test_those_that_say_the_choice_themselves_do_not_warn(monkeypatch):
    """The report, and the trainer, whose first line holds the reasons."""
    missing(monkeypatch, "cpu")
    (name, words), messages = warned(lambda: auto.backend("auto", 4, 8, torch.device("cpu")))
    assert name == "chunked" and "cpu: its extension is not there" in words and not messages
    monkeypatch.undo()
    assert not warned(info.report)[1]


def test_its_class_can_be_filtered():
    """Ignored, it is not shown; as an error it is one at every call."""
    x = unit_rows(4, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", SlowerBackendWarning)
        softclip_loss(x, x, torch.ones(()))
    assert not caught
    backends._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerBackendWarning)
        for _ in range(2):
            with pytest.raises(SlowerBackendWarning, match="not float64"):
                softclip_loss(x, x, torch.ones(()))


WITHOUT_BUILDS = """
import sys
sys.modules["softclip_kernels._cpu"] = sys.modules["triton"] = None
import torch, softclip_kernels
x = torch.eye(3)
for _ in range(3):
    assert softclip_kernels.softclip_loss(x, x, torch.ones(())).isfinite()
"""


def test_python_shows_it_by_default():
    """Without triton and the CPU build, in a process of its own with Python's own filters: once."""
    command = [sys.executable, "-c", WITHOUT_BUILDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = "SlowerBackendWarning: the loss is computed by the backend 'chunked', slower than 'cpu'"
    assert done.stderr.count(said) == 1
    assert "install the package where a C++ compiler is" in done.stderr


@needs_cpu_kernels
def test_the_former_name_of_the_cpu_backend_still_works_and_says_the_new_one():
    x = unit_rows(8, 4, dtype=torch.float32)
    with pytest.warns(DeprecationWarning, match="backend='native' is now called 'cpu'") as caught:
        loss = softclip_loss(x, x, torch.tensor(9.0), backend="native")
    assert loss == softclip_loss(x, x, torch.tensor(9.0), backend="cpu")
    assert [one.filename for one in caught] == [__file__]  # where it is written, so that Python shows it there
    with pytest.warns(DeprecationWarning, match="now called 'cpu'") as caught:
        module = SoftClipLoss(backend="native")
    assert module.backend == "cpu" and [one.filename for one in caught] == [__file__]


@needs_cpu_kernels
def test_the_former_name_of_the_variable_that_forces_a_level_still_works(monkeypatch):
    monkeypatch.setenv(cpu.FORMER_ISA_VARIABLE, "portable")
    with pytest.warns(DeprecationWarning, match="SOFTCLIP_NATIVE_ISA is now called SOFTCLIP_CPU_ISA"):
        assert cpu.level() == "portable"
    monkeypatch.setenv(cpu.ISA_VARIABLE, cpu.levels()[0])
    assert cpu.level() == cpu.levels()[0]  # the new name wins
    monkeypatch.delenv(cpu.ISA_VARIABLE)
    monkeypatch.setenv(cpu.FORMER_ISA_VARIABLE, "avx1024")
    with (
        pytest.warns(DeprecationWarning, match="now called"),
        pytest.raises(ValueError, match="SOFTCLIP_NATIVE_ISA='avx1024'"),
    ):
        cpu.level()
