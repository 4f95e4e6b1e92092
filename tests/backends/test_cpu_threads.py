"""Whose threads the CPU kernels work on: PyTorch's own where they can be had, else new ones for each call. Each test in
a process of its own, for PyTorch's threads, once awake, stay."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.backends import needs_cpu_kernels

from softclip_kernels import softclip_loss
from softclip_kernels.backends import cpu
from softclip_kernels.testing import operands

pytestmark = [
    needs_cpu_kernels,
    pytest.mark.skipif(sys.platform != "linux", reason="counts threads, and takes cores away, as Linux does"),
]

# loss(): of 300 pairs, which no operator of PyTorch has yet woken a thread for; tasks(): this process's threads.
PRELUDE = """
import os, sys, time, torch
from softclip_kernels.backends import cpu
from softclip_kernels.testing import Result, operands
worth = cpu.MULTIPLY_ADDS_PER_THREAD
cpu.MULTIPLY_ADDS_PER_THREAD = dict.fromkeys(cpu.THREADS, 1)
torch.set_num_threads(1)
given = operands(300, 300, 64, dtype=torch.float32)
torch.set_num_threads(int(sys.argv[1]))
loss = lambda: Result.of_loss(*given, None, backend="cpu")
tasks = lambda: len(os.listdir("/proc/self/task"))
"""


def run_python(code, threads, whose="shared"):
    environment = os.environ | {"OMP_NUM_THREADS": "2", cpu.THREADS_VARIABLE: whose}
    command = [sys.executable, "-c", PRELUDE + code, str(threads)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize(("whose", "stay"), (("shared", 2), ("own", 0)))
def test_threads_are_pytorchs_unless_the_environment_says_own(whose, stay):
    """OpenMP's stay behind; three threads, of which the caller is one."""
    code = "before = tasks(); print(cpu.threads_in_use()); loss(); print(tasks() - before)"
    assert run_python(code, 3, whose) == [whose, str(stay)]


def test_no_more_are_taken_than_pytorch_has():
    """Where PyTorch is told to use one thread, none of OpenMP's wakes."""
    code = "torch.get_num_threads = lambda: 3; before = tasks(); loss(); print(tasks() - before)"
    assert run_python(code, 1) == ["0"]


def test_whose_threads_they_are_changes_no_bit():
    """Nor where so small a problem is worth a thread of PyTorch's, and no new one."""
    code = "one = loss(); print(*(float.hex(each.double().abs().sum().item()) for each in (one.loss, one.dx, one.dy)))"
    worth = "cpu.MULTIPLY_ADDS_PER_THREAD = worth; "
    expected = run_python(code, 2)
    assert run_python(code, 1) != expected  # the order of sums is another
    assert [run_python(worth + code, 2, whose) for whose in cpu.THREADS] == [expected, expected]
    assert run_python(code, 2, "own") == expected


def test_a_forked_child_has_threads_of_its_own():
    """OpenMP's do not survive the fork, and a child that waited for them would wait for ever."""
    code = """
expected = loss()
while cpu.threads_in_use() == "own":  # where others kept a thread from its core
    time.sleep(0.05)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # else PyTorch's own operators wait for its threads
    torch.get_num_threads = lambda: 2
    os._exit(0 if cpu.threads_in_use() == "own" and not loss().differing(expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code, 2) == ["0"]


def test_threads_that_get_no_core_are_given_back():
    """Two threads on one core: OpenMP's keep it from each other while they wait, so own ones, which sleep, take their
    place for a while."""
    code = """
loss()
given = operands(1500, 1500, 64, dtype=torch.float32)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
seen = set()
end = time.monotonic() + 60
while "own" not in seen and time.monotonic() < end:
    loss()
    seen.add(cpu.threads_in_use())
own = time.monotonic()
while cpu.threads_in_use() == "own" and time.monotonic() < own + 60:
    time.sleep(0.05)
print(*sorted(seen)[:1], time.monotonic() - own < 3)
"""
    assert run_python(code, 2) == ["own", "True"]


def test_an_environment_that_says_neither_is_an_error(monkeypatch):
    monkeypatch.setenv(cpu.THREADS_VARIABLE, "mine")
    with pytest.raises(ValueError, match=r"'mine'.*allowed: shared, own"):
        softclip_loss(*operands(3, 3, 4, dtype=torch.float32))
