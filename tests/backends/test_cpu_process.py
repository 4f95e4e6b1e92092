"""The CPU backend in the process around it: which backend and level are chosen, interruption, the interpreter lock,
threads that cannot be had, forked children and the data loader's workers."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import ROOT, signals
from helpers.backends import needs_cpu_kernels

from softclip_kernels import backends, softclip_loss
from softclip_kernels.backends import cpu, registered
from softclip_kernels.problem import Problem
from softclip_kernels.stats import StatisticsGradient, Wanted
from softclip_kernels.testing import unit_rows

pytestmark = needs_cpu_kernels

CPU = registered()["cpu"]


def run_python(code):
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=signals.restore)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_auto_takes_float32_and_bfloat16():
    x = unit_rows(8, 4, dtype=torch.float32)
    for dtype, name in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "chunked")):
        one = x.to(dtype)
        assert backends.select("auto", Problem(one, one, torch.ones(()))).name == name
    assert "float16" in str(CPU.why_not(Problem(x.half(), x.half(), torch.ones(()))))


def test_unknown_level_is_an_error(monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, "avx1024")
    with pytest.raises(ValueError, match=r"'avx1024'.*allowed: .*portable"):
        softclip_loss(torch.eye(3), torch.eye(3), torch.ones(()))


INTERRUPTED = """
import os, signal, threading, time, torch
from softclip_kernels.backends import registered
from softclip_kernels.problem import Problem
from softclip_kernels.stats import Statistics, StatisticsGradient, Wanted
torch.set_num_threads(2)
backend = registered()["cpu"]
x = torch.randn(60000, 512)
problem, zero = Problem(x, x, torch.ones(())), torch.zeros(1, 60000)
zeros = zero, zero, zero[0]
threading.Timer(1.0, lambda: (print(time.time(), flush=True), os.kill(os.getpid(), signal.SIGINT))).start()
try:
    {call}
except KeyboardInterrupt:
    print(time.time())
"""


@pytest.fixture
def started_in_the_background():
    """With SIGINT and SIGQUIT ignored, as under a shell that starts `make test &`."""
    before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGQUIT)}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.parametrize(
    "call",
    (
        "backend.forward(problem)",
        "backend.backward(problem, Statistics.of(*zeros), StatisticsGradient(*zeros), Wanted())",
    ),
)
def test_an_interrupt_ends_a_call_within_a_second(call, started_in_the_background):
    """Ctrl-C during a call that would take minutes ends it, in a process of its own."""
    sent, ended = map(float, run_python(INTERRUPTED.format(call=call)))
    assert ended - sent < 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux counts it")
def test_threads_that_cannot_be_had_are_an_error():
    """Where the system refuses memory or the 40th thread the call is an error, and the next one works."""
    code = """
import resource, torch
from pathlib import Path
from softclip_kernels import backends, softclip_loss
from softclip_kernels.backends import cpu
cpu.MULTIPLY_ADDS_PER_THREAD = dict.fromkeys(cpu.THREADS, 1)
x = torch.nn.functional.normalize(torch.randn(500, 64))
loss = lambda: softclip_loss(x, x, torch.tensor(9.0), backend="cpu").item()
expected = loss()
size = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line)
count = torch.get_num_threads()
torch.get_num_threads = lambda: 64
for extra in (4, 150, 300):
    resource.setrlimit(resource.RLIMIT_AS, ((size << 10) + (extra << 20), resource.RLIM_INFINITY))
    try:
        print("done" if abs(loss() - expected) < 1e-4 else "wrong")
    except (MemoryError, RuntimeError):
        print("refused")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("done" if abs(loss() - expected) < 1e-4 else "wrong")
"""
    *limited, free = run_python(code)
    assert free == "done" and "wrong" not in limited and "refused" in limited


def test_other_python_threads_run_meanwhile(threads):
    """The interpreter lock is released: a Python thread advances while a call runs."""
    x = unit_rows(4000, 64, dtype=torch.float32)
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    CPU.forward(Problem(x, x, torch.ones(())))
    end = time.perf_counter()
    stop.set()
    ticker.join()
    assert sum(start < one < end for one in ticks) >= 3, f"{end - start:.3f} s"


def _loss_in_child(queue):
    x = unit_rows(300, 16, dtype=torch.float32)
    queue.put(softclip_loss(x, x, torch.tensor(10.0), backend="cpu").item())


def test_a_forked_child_computes_after_its_parent(threads):
    """A forked child computes after its parent has, as data-loader workers do."""
    x = unit_rows(300, 16, dtype=torch.float32)
    expected = softclip_loss(x, x, torch.tensor(10.0), backend="cpu").item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_loss_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == pytest.approx(expected, rel=1e-6)
    finally:
        child.join(timeout=10)
        assert child.exitcode == 0


class _Losses(torch.utils.data.Dataset):
    """Item i: a loss and a gradient's sum, computed where the item is asked for."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        x = unit_rows(300, 16, seed=index, dtype=torch.float32)
        problem = Problem(x, x, torch.tensor(9.0), torch.arange(300))
        statistics = CPU.forward(problem)
        ones = StatisticsGradient(torch.ones(1, 300), torch.ones(1, 300), torch.zeros(300))
        dx, *_ = CPU.backward(problem, statistics, ones, Wanted())
        return torch.stack([statistics.rows.packed.sum(), dx.abs().sum()])


def test_data_loader_workers_compute_beside_a_busy_thread(threads):
    """Forked while another thread is within a call."""
    expected = torch.stack([_Losses()[index] for index in range(6)])
    x = unit_rows(3000, 128, dtype=torch.float32)
    busy = threading.Thread(target=lambda: CPU.forward(Problem(x, x, torch.tensor(9.0))))
    busy.start()
    loader = torch.utils.data.DataLoader(
        _Losses(), batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    got = torch.cat(list(loader))
    busy.join()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
