"""Two commits beside each other on the CPU: both found to be right, then timed in turns.

python -m bench compare main                        the commit `main` and the working tree
python -m bench compare v1 --against v2 --only hard psd --n 256 8192 --dtype float32

A commit is checked out in a temporary git worktree and its CPU extension is built there; the working tree is taken
as it was built. Each tree runs in a process of its own for the whole comparison, both with as many threads, and a round
is A B B A. A speedup is a round's seconds of the first tree over those of the second: above 1, the second is faster. A
tree whose loss or gradients are wrong is named and nothing is timed (exit code 1). "same bits": both trees' results are
equal to the last bit. Rows go to bench/results/compare/.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from softclip_kernels.testing import Result, Standard

from . import ROOT, Row, problems
from .problems import Case
from .records import Record, table
from .timing import interleaved, quartiles

WORKER = Path(__file__).with_name("compare_worker.py")
WORKING_TREE = "working tree"
LABELS = ("base", "against", "loss", "dtype", "n", "d", "threads")
CHECKED = 1000  # rows up to which float64 is the standard; larger problems are also compared with dense float32
SHORTEST = 0.05  # seconds of a measurement, at least: smaller problems are run several times


@dataclass(frozen=True)
class Tree:
    """A built checkout: how it is called, and where it is."""

    name: str
    path: Path


def save(case: Case, path: Path) -> None:
    """What compare_worker.py makes its problem of."""
    x, y, scale = (leaf.detach() for leaf in case.operands())
    a, b = problems.teacher_embeddings(case.n, case.d, case.dtype, case.device)
    soft = problems.soft_rows(case.n).float().to(case.device)
    teacher = {"a": a, "b": b, "teacher_scale": problems.TEACHER_SCALE}
    torch.save({"loss": case.loss, "x": x, "y": y, "scale": scale, "soft": soft, **teacher}, path)


class Side:
    """A tree's process, which has `environment` beside this one's own; `folder` is for what is exchanged with it."""

    def __init__(self, tree: Tree, environment: Mapping[str, str], folder: Path) -> None:
        self.tree, self._folder = tree, folder
        self._errors = (folder / f"{tree.path.name}.txt").open("w+")
        # With -c the tree's folder, in which it runs, is the first that Python looks for packages in.
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER.read_text()],
            cwd=tree.path,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        file = Path(self._answer()["file"])
        if not file.is_relative_to(tree.path.resolve()):
            raise SystemExit(f"{tree.name}: softclip_kernels was imported from {file}, not from {tree.path}")

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def take(self, case: Case) -> None:
        path = self._folder / "problem.pt"
        save(case, path)
        self._ask({"problem": str(path)})

    def result(self) -> Result:
        path = self._folder / "result.pt"
        self._ask({"result": str(path)})
        return Result(*torch.load(path, weights_only=True))

    def seconds(self, calls: int) -> float:
        return self._ask({"calls": calls})["seconds"]

    def _ask(self, command: Mapping[str, Any]) -> Row:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise SystemExit(
                f"{self.tree.name} ended with exit code {self._process.wait()}: {_tail(self._errors.read())}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"{self.tree.name} failed: {answer['error']}")
        return answer


def check(sides: Sequence[Side], case: Case) -> bool:
    """Whether both sides' results have the same bits. A wrong one ends the program (SystemExit).

    Up to CHECKED rows the library's standard is float64; a larger problem is checked there and against dense float32.
    """
    for size in sorted({min(case.n, CHECKED), case.n}):
        small = replace(case, n=size)
        x, y, scale = (leaf.detach() for leaf in small.operands())
        standard = Standard.of(x, y, scale, small.target()) if size <= CHECKED else None
        results = []
        for side in sides:
            side.take(small)
            results.append(side.result())
            try:
                if standard is not None:
                    standard.check(results[-1])
                else:
                    problems.check_at_size(small, {side.tree.name: results[-1]}, x, y, scale)
            except AssertionError as error:
                what = " ".join(map(str, small.labels().values()))
                raise SystemExit(f"{side.tree.name} is wrong: {what}: {error}; nothing was timed") from None
    first, second = results
    return not first.differing(second)


def measure(sides: Sequence[Side], case: Case, rounds: int) -> Row:
    """The seconds of both trees, and the median and quartiles of the rounds' speedups."""
    base, against = sides
    for side in sides:
        side.take(case)
    calls = max(1, math.ceil(SHORTEST / max(1e-6, min(side.seconds(3) for side in sides))))
    turns = {"against": partial(against.seconds, calls), "base": partial(base.seconds, calls)}  # the last one begins
    timings = interleaved(turns, 2 * rounds, warm_up=0, measure=lambda run: run())
    first, second = (timings[name].seconds for name in ("base", "against"))
    speedups = [sum(first[turn : turn + 2]) / sum(second[turn : turn + 2]) for turn in range(0, 2 * rounds, 2)]
    speedup, low, high = quartiles(speedups)
    return {
        "base seconds": timings["base"],
        "against seconds": timings["against"],
        "speedup": speedup,
        "low": low,
        "high": high,
    }


def compare(base: Tree, against: Tree, cases: Sequence[Case], rounds: int, threads: int) -> list[Row]:
    """A row for every case: checked all of them, then timed."""
    # Threads that wait must not spin: the other tree's turn follows.
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = []
        for name, tree in (("base", base), ("against", against)):
            check_built(tree)
            (Path(folder) / name).mkdir()
            sides.append(stack.enter_context(Side(tree, environment, Path(folder) / name)))
        same = [check(sides, case) for case in cases]
        names: Row = {"base": base.name, "against": against.name}
        rows = []
        for case, equal in zip(cases, same, strict=True):
            rows.append(
                {**names, **case.labels(), "threads": threads, **measure(sides, case, rounds), "same bits": equal}
            )
        return rows


@contextmanager
def checked_out(revision: str, repository: Path = ROOT) -> Iterator[Tree]:
    """A commit's tree, built, for as long as the block lasts. Raises SystemExit where there is no such commit, or where
    it does not build."""
    commit = _git(
        repository,
        f"{revision!r} is not a commit of this repository",
        "rev-parse",
        "--verify",
        f"{revision}^{{commit}}",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / commit[:12]
        _git(repository, f"{revision} cannot be checked out", "worktree", "add", "--detach", str(path), commit)
        try:
            print(f"building {revision}", flush=True)
            done = subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=path, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{revision} does not build: {_tail(done.stdout + done.stderr)}")
            tree = Tree(revision if revision.startswith(commit[:7]) else f"{revision} ({commit[:12]})", path)
            check_built(tree, done.stdout + done.stderr)
            yield tree
        finally:
            _git(repository, "cannot be removed", "worktree", "remove", "--force", str(path))


def check_built(tree: Tree, output: str = "") -> None:
    """SystemExit where there is no CPU extension for this Python, as where there is no compiler (`output`)."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    if not any((tree.path / "softclip_kernels").rglob(f"*{suffix}")):
        help = f": {_tail(output)}" if output else "; build it: python setup.py build_ext --inplace"
        raise SystemExit(f"{tree.name} has no CPU extension for this Python{help}")


def _git(repository: Path, refusal: str, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{refusal}: {_tail(done.stderr)}")
    return done.stdout.strip()


def _tail(text: str) -> str:
    return text.strip()[-1500:]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("base", help="a commit, branch or tag")
    parser.add_argument("--against", default=WORKING_TREE, help="another one (default: the working tree)")
    parser.add_argument("--only", nargs="+", choices=problems.LOSSES, default=problems.LOSSES, help="(default: all)")
    parser.add_argument("--n", type=int, nargs="+", default=[256, 1024, 8192], help="(default: 256 1024 8192)")
    parser.add_argument("--d", type=int, default=512, help="embedding width (default: 512)")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9, help="of A B B A (default: 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    options = parser.parse_args(arguments)
    if min(*options.n, options.d, options.rounds, options.threads) < 1:
        parser.error("--n, --d, --rounds and --threads must be at least 1")
    dtypes = [getattr(torch, name) for name in options.dtype]
    cases = [Case(*case, options.d) for case in itertools.product(options.only, dtypes, options.n)]
    record = Record("compare", "cpu", LABELS)
    with ExitStack() as stack:
        base = stack.enter_context(checked_out(options.base))
        against = Tree(WORKING_TREE, ROOT)
        if options.against != WORKING_TREE:
            against = stack.enter_context(checked_out(options.against))
        rows = compare(base, against, cases, options.rounds, options.threads)
    record.add(rows)
    print(f"{table(rows)}\n\nwritten to {record.path}")
