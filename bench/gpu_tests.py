"""tests/test_triton_gpu.py over several processes on one GPU: most of its time goes to compiling kernels.

Plain pytest, of which this module is also a plugin (-p bench.gpu_tests): every process takes each n-th test and writes
what became of it to a log as it goes. So a process that is ended loses one test, and one that crashes, or whose CUDA
context is lost, is followed by another that goes on behind it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent
SUITE = ROOT / "tests" / "backends" / "test_triton_gpu.py"
LOG, SHARE = "SOFTCLIP_TEST_LOG", "SOFTCLIP_TEST_SHARE"
LOST_CONTEXT = ("CUDA error", "Triton Error", "device-side assert")  # later tests of the process would fail as well
NONE_LEFT = 5  # pytest's exit code
STUCK = 90.0  # seconds without a word after which a process is ended


def processes() -> int:
    """A multiple of three, so that a process has tests of one dtype and compiles few kernels that another does, too."""
    return min(12, max(3, (os.cpu_count() or 1) // 3 * 3))


def run(seconds: float, suite: Path = SUITE, count: int | None = None) -> Row:
    """What became of every test, after `seconds` at most. Passed: tests passed, and none but skipped ones did not."""
    start = time.monotonic()
    count = processes() if count is None else count
    with tempfile.TemporaryDirectory() as folder:
        shares = [_Share(suite, Path(folder), index, count) for index in range(count)]
        while time.monotonic() - start < seconds and not all([share.finished() for share in shares]):
            time.sleep(0.1)
        for share in shares:
            share.end()
        return _row(shares) | {"processes": count, "seconds": time.monotonic() - start}


class _Share:
    """The tests of one process, or of several after one another where one does not survive."""

    def __init__(self, suite: Path, folder: Path, index: int, count: int) -> None:
        self.log, self.output = folder / f"{index}.jsonl", folder / f"{index}.txt"
        self.log.touch()
        self._command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        self._command += ["-p", __name__, str(suite)]
        self._environment = os.environ | {
            LOG: str(self.log),
            SHARE: f"{index}/{count}",
            "OMP_NUM_THREADS": "1",
            "SOFTCLIP_AUTOTUNE": "0",  # what processes measure that share a GPU must not be remembered
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        self.failure: str | None = None
        self._start()

    def _start(self) -> None:
        self._begun_before = self._begun()
        self._started = time.time()
        with self.output.open("a") as output:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=output, stderr=subprocess.STDOUT
            )

    def _begun(self) -> int:
        return sum("test" in entry for entry in _entries(self.log))

    def finished(self) -> bool:
        code = self._process.poll()
        if code is None:
            if time.time() - max(self._started, self.log.stat().st_mtime) > STUCK:
                self._process.kill()  # the test it hangs in counts as not finished; another process goes on
            return False
        any_begun = self._begun() > self._begun_before
        if self.failure or code in (0, NONE_LEFT) or (code == 1 and any_begun):
            return True
        if not any_begun:  # another one would do no better
            self.failure = f"pytest ended with exit code {code}: {self.output.read_text()[-1500:]}"
            return True
        self._start()
        return False

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)


def _row(shares: list[_Share]) -> Row:
    tests: dict[str, Row] = {}
    for share in shares:
        for entry in _entries(share.log):
            for name in entry.get("collected", ()):
                tests.setdefault(name, {"outcome": "not finished"})
            if "test" in entry and tests.get(entry["test"], {}).get("outcome") != "failed":
                tests[entry["test"]] = entry
    outcomes = Counter(entry["outcome"] for entry in tests.values())
    failures = [
        {"test": name, **entry} for name, entry in tests.items() if entry["outcome"] not in ("passed", "skipped")
    ]
    problems = [share.failure for share in shares if share.failure]
    slowest = sorted(tests, key=lambda name: tests[name].get("seconds", 0.0), reverse=True)[:5]
    return {
        "kind": "tests",
        "passed": outcomes["passed"] > 0 and not failures and not problems,
        "outcome": ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items()) or "no tests",
        "failures": failures,
        "problems": problems,
        "skipped": Counter(entry["message"] for entry in tests.values() if entry["outcome"] == "skipped"),
        "slowest": {name: tests[name].get("seconds") for name in slowest},
    }


def _entries(log: Path) -> Iterator[Row]:
    for line in log.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # cut off when its process was ended
            return


# The plugin: what follows runs in the processes above.


class _Plugin:
    session: Any = None


def pytest_sessionstart(session: Any) -> None:
    _Plugin.session = session


def pytest_collection_modifyitems(items: list[Any]) -> None:
    index, count = map(int, os.environ[SHARE].split("/"))
    begun = {entry.get("test") for entry in _entries(Path(os.environ[LOG]))}
    own = items[index::count]
    _write({"collected": [item.nodeid for item in own]})
    items[:] = [item for item in own if item.nodeid not in begun]


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"test": nodeid, "outcome": "not finished"})


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    message = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-1500:]
    _write({"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "message": message})
    if report.outcome == "failed" and any(sign in report.longreprtext for sign in LOST_CONTEXT):
        _Plugin.session.shouldstop = "the CUDA context is lost"


def _write(entry: Row) -> None:
    with open(os.environ[LOG], "a") as log:
        log.write(json.dumps(entry) + "\n")
