"""What serves a machine that is there for minutes: work in other processes, each call with a limit of time, and the
tests of a file over several such processes.

A hang, a crash or a lost CUDA context ends the call that met it, and the next call gets a fresh process.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import ROOT, Row

LOST_CONTEXT = ("CUDA error", "Triton Error", "device-side assert")  # later work of the process would fail as well
STUCK = 90.0  # seconds after which a test counts as hanging
NO_TESTS = 5  # pytest's exit code
TESTING = {  # the environment of the processes that run tests
    "OMP_NUM_THREADS": "1",
    "SOFTCLIP_AUTOTUNE": "0",  # what processes measure that share a GPU must not be remembered
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}


class Failed(Exception):
    """A call's failure in the other process: one line, and the traceback where there is one."""

    def __init__(self, line: str, details: str = "", assertion: bool = False) -> None:
        super().__init__(line)
        self.details = details
        self.assertion = assertion  # a wrong result; everything else may have left the GPU's context unusable


class Worker:
    """Runs functions one after the other in one other process, which has `environment` added to its own and which
    `prepare` readies. `method` is how it starts: "spawn", or "forkserver" where many are started without a GPU, for
    CUDA does not survive a fork."""

    def __init__(
        self,
        prepare: Callable[[], object] | None = None,
        environment: Mapping[str, str] | None = None,
        method: str = "spawn",
    ) -> None:
        self._prepare, self._environment, self._method = prepare, dict(environment or {}), method
        self._process: Any = None
        self._connection: Connection | None = None

    def call(self, function: Callable[..., Any], arguments: Mapping[str, Any], seconds: float) -> Any:
        """function(**arguments) in the other process. Raises Failed where it raises, dies or takes longer."""
        connection = self._start() if self._connection is None else self._connection
        try:
            connection.send((function, dict(arguments)))
            answer = connection.recv() if connection.poll(seconds) else None
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.end()
            raise Failed(f"its process ended with exit code {code}") from None
        if answer is None:
            self.end()
            raise Failed(f"not finished after {seconds:.0f} s")
        result, failure = answer
        if failure is not None:
            if not failure.assertion:
                self.end()
            raise failure
        return result

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(5)
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> Connection:
        context: Any = multiprocessing.get_context(self._method)
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._prepare, self._environment), daemon=True)
        self._process.start()
        other.close()  # the other process holds the only copy, so that its end is noticed
        return self._connection


def forked_from(module: str) -> Worker:
    """Forked from a process that has imported this module and computed nothing: it starts at once, wherever it is
    used."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([module])
    return Worker(method="forkserver")


def _serve(connection: Connection, prepare: Callable[[], object] | None, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    import torch  # with OMP_NUM_THREADS in the environment

    gc.freeze()  # torch's objects stay, and looking through them takes a tenth of a second a collection
    if prepare is not None:
        prepare()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, Failed | None]
        try:
            answer = function(**arguments), None
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            details = traceback.format_exc()[-4000:]
            answer = None, Failed(f"{type(error).__name__}: {line}", details, isinstance(error, AssertionError))
        connection.send(answer)
        del answer
        gc.collect()
        torch.cuda.empty_cache()  # for the other processes of the run


def run_tests(suite: Path, seconds: float, processes: int | None = None) -> Row:
    """What became of every test of a file after `seconds` at most: most of the GPU tests' time goes to compiling
    kernels, so several processes share the GPU. Plain pytest, without plugins. Passed: tests passed, and none but
    skipped ones did not."""
    start, suite = time.monotonic(), suite.resolve()
    # A multiple of three, so that a process has tests of one dtype and compiles few kernels that another does, too.
    count = processes or min(12, max(3, (os.cpu_count() or 1) // 3 * 3))
    workers = [Worker(environment=TESTING) for _ in range(count)]
    outcomes: dict[str, Row] = {}
    problems: list[str] = []

    def run_share(index: int) -> None:
        for test in list(outcomes)[index::count]:
            left = start + seconds - time.monotonic()
            if left <= 0:
                return
            try:
                outcomes[test] = workers[index].call(_run_test, {"suite": suite, "test": test}, min(STUCK, left))
            except Failed as failure:
                outcomes[test] = {"outcome": "not finished", "message": str(failure)}
            if outcomes[test].get("context lost"):
                workers[index].end()

    try:
        for test in workers[0].call(_collect, {"suite": suite}, seconds):
            outcomes[test] = {"outcome": "not finished", "message": "no time left"}
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(run_share, range(count)))
    except Failed as failure:
        problems.append(f"{failure}\n{failure.details}")
    finally:
        for worker in workers:
            worker.end()
    counts = Counter(row["outcome"] for row in outcomes.values())
    failures = [{"test": test, **row} for test, row in outcomes.items() if row["outcome"] not in ("passed", "skipped")]
    slowest = sorted(outcomes, key=lambda test: outcomes[test].get("seconds", 0.0), reverse=True)[:5]
    return {
        "passed": counts["passed"] > 0 and not failures and not problems,
        "outcome": ", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "no tests",
        "failures": failures,
        "problems": problems,
        "skipped": Counter(row["message"] for row in outcomes.values() if row["outcome"] == "skipped"),
        "slowest": {test: outcomes[test].get("seconds") for test in slowest},
        "processes": count,
        "seconds": time.monotonic() - start,
    }


def _collect(suite: Path) -> list[str]:
    return _pytest(str(suite), "--collect-only").collected


def _run_test(suite: Path, test: str) -> Row:
    return _pytest(f"{suite}::{test.partition('::')[2]}").row


class _Watch:
    """A plugin: what was collected, and what became of the last test."""

    def __init__(self) -> None:
        self.collected: list[str] = []
        self.row: Row = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.collected = [item.nodeid for item in items]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if (report.when != "call" and report.outcome == "passed") or self.row.get("outcome") == "failed":
            return
        message = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-1500:]
        lost = report.failed and any(sign in report.longreprtext for sign in LOST_CONTEXT)
        self.row = {"outcome": report.outcome, "seconds": report.duration, "message": message, "context lost": lost}


def _pytest(*arguments: str) -> _Watch:
    import pytest

    watch, output = _Watch(), io.StringIO()
    os.chdir(ROOT)
    with contextlib.redirect_stdout(output):
        code = pytest.main([*arguments, "-q", "--tb=short", "-p", "no:cacheprovider"], plugins=[watch])
    if code not in (0, NO_TESTS) and not watch.row:
        raise RuntimeError(f"pytest ended with exit code {int(code)}: {output.getvalue()[-1500:]}")
    return watch
