"""How many threads a rank computes with, however it was started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PYTHONPATH

from train import threads

SIXTEEN = frozenset(range(16))


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: SIXTEEN)
    monkeypatch.setattr(threads, "cpu_count", lambda: 8)  # a container's
    for name in (threads.VARIABLE, threads.UNDER_TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("asked", "environment", "ranks", "number"),
    (
        (None, {}, 2, 4),  # an equal share
        (None, {}, 16, 1),
        (None, {"OMP_NUM_THREADS": "1"}, 2, 1),  # a person's
        (None, {"OMP_NUM_THREADS": "3,2"}, 2, 3),
        (None, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 2, 4),  # torchrun's
        (None, {"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, 2, 2),  # a person's, under torchrun
        (None, {"OMP_NUM_THREADS": "no number"}, 2, 4),
        (5, {"OMP_NUM_THREADS": "1"}, 2, 5),
    ),
)
def test_what_a_person_asked_for_comes_first(
    sixteen_cores: pytest.MonkeyPatch, asked: int | None, environment: dict[str, str], ranks: int, number: int
) -> None:
    for name, value in environment.items():
        sixteen_cores.setenv(name, value)
    assert threads.threads_of(asked, ranks) == number


V1 = "4:cpu,cpuacct:/docker/abc\n0::/\n"
V2 = "0::/job.slice/step"


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    (
        (V2, {}, 16),
        (V2, {"cpu.max": "max 100000"}, 16),
        (V2, {"cpu.max": "200000 100000"}, 2),  # a container sees its own as the root
        (V2, {"job.slice/cpu.max": "350000 100000", "job.slice/step/cpu.max": "max 100000"}, 4),  # 3.5
        (V2, {"job.slice/cpu.max": "50000 100000", "cpu.max": "200000 100000"}, 1),
        (V2, {"job.slice/cpu.max": "9900000 100000"}, 16),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "300000", "cpu/docker/abc/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("", {}, 16),
    ),
)
def test_a_limit_on_the_processor_time_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: SIXTEEN)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert threads.cpu_count(groups, tmp_path) == cores


WORK = """
import json, time, torch
from train.options import JobOptions
from train.world import join_world

with join_world(JobOptions(device="cpu", threads=THREADS)) as world:
    layer, rows = torch.nn.Linear(512, 512), torch.randn(2048, 512)
    wall, processor = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < 1.5:
        layer(rows).square().sum().backward()
    spent = (time.process_time() - processor) / (time.perf_counter() - wall)
    print(json.dumps([world.threads, torch.get_num_threads(), spent]))
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(
    ("asked", "variable", "number"), (("1", None, 1), ("None", "1", 1), ("2", "1", 2), ("None", None, None))
)
def test_a_rank_computes_with_that_many(asked: str, variable: str | None, number: int | None) -> None:
    """Processor time over wall time: one thread cannot spend more than 1, and a little for the interpreter's own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS",)}
    environment |= {"PYTHONPATH": PYTHONPATH, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {} if variable is None else {"OMP_NUM_THREADS": variable}
    command = [sys.executable, "-c", WORK.replace("THREADS", asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    decided, in_force, spent = json.loads(done.stdout.splitlines()[-1])
    assert decided == in_force == (number or threads.cpu_count())
    if decided == 1:
        assert spent <= 1.25
