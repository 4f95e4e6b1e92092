"""`python -m bench compare`: trees that are wrong on purpose are refused, and those that are right timed in turns."""

from __future__ import annotations

import importlib.machinery
import shutil
import subprocess

import pytest
import torch
from helpers import ROOT
from helpers.backends import needs_cpu_kernels

from bench import compare
from bench.compare import Tree
from bench.problems import Case

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
CASES = [Case("hard", torch.float32, 65, 32), Case("psd", torch.bfloat16, 40, 32)]
# Appended to a stand-in's __init__.py: its loss is the library's times a factor.
TAMPER = """
_right = softclip_loss
def softclip_loss(*arguments, **options):
    return {factor} * _right(*arguments, **options)
"""
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def tree(tmp_path):
    """A copy of the library, with a factor before its loss."""

    def make(name, factor="1"):
        path = tmp_path / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "softclip_kernels", path / "softclip_kernels", ignore=ignored)
        with (path / "softclip_kernels" / "__init__.py").open("a") as module:
            module.write(TAMPER.format(factor=factor))
        return Tree(name, path)

    return make


@needs_cpu_kernels
def test_trees_that_are_right_are_timed(tree, monkeypatch):
    """One result differs in its last bit only."""
    monkeypatch.setattr(compare, "SHORTEST", 0.0)
    new = tree("new", "(1 + 2**-23 * (len(arguments[0]) == 65))")
    rows = compare.compare(tree("old"), new, CASES, rounds=2, threads=1)
    assert [(row["loss"], row["dtype"], row["n"], row["d"], row["same bits"]) for row in rows] == [
        ("hard", "float32", 65, 32, False), ("psd", "bfloat16", 40, 32, True)
    ]  # fmt: skip
    for row in rows:
        assert row["base"] == "old" and row["against"] == "new" and row["threads"] == 1
        assert 0 < row["low"] <= row["speedup"] <= row["high"]
        assert len(row["base seconds"].seconds) == len(row["against seconds"].seconds) == 4


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    (
        ("0.95", "1", "old is wrong: hard float32 50 32: loss: "),
        # In the last case, and beyond the size that float64 is the standard of.
        (
            "1",
            "(1.05 if len(arguments[0]) == 60 else 1)",
            "new is wrong: psd bfloat16 60 32: new against dense: ",
        ),
    ),
)
def test_a_tree_that_is_wrong_is_named_and_nothing_is_timed(tree, old, new, wrong, monkeypatch):
    monkeypatch.setattr(compare, "CHECKED", 50)
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("timed"))
    cases = [CASES[0], Case("psd", torch.bfloat16, 60, 32)]
    with pytest.raises(SystemExit) as refused:
        compare.compare(tree("old", old), tree("new", new), cases, rounds=1, threads=1)
    assert refused.value.code.startswith(wrong) and refused.value.code.endswith("; nothing was timed")


class _Fake:
    """A side that takes one second or two, and remembers whose turn it was."""

    turns: list[str] = []  # noqa: RUF012

    def __init__(self, name, seconds):
        self._name, self._seconds = name, seconds

    def take(self, case):
        pass

    def seconds(self, calls):
        self.turns.append(self._name)
        return self._seconds


def test_the_sides_take_turns(monkeypatch):
    monkeypatch.setattr(_Fake, "turns", [])
    row = compare.measure([_Fake("A", 2.0), _Fake("B", 1.0)], CASES[0], rounds=3)
    assert "".join(_Fake.turns) == "AB" + 3 * "ABBA"
    assert (row["speedup"], row["low"], row["high"]) == (2.0, 2.0, 2.0)


@needs_cpu_kernels
def test_a_tree_that_is_not_built_or_falls_back_is_refused(tree):
    new = tree("new")
    (library,) = new.path.rglob(f"*{SUFFIX}")
    library.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"^new failed: SlowerBackendWarning"):
        compare.compare(new, new, CASES, rounds=1, threads=1)
    library.unlink()
    with pytest.raises(SystemExit, match=r"^new has no CPU extension for this Python; build it"):
        compare.compare(new, new, CASES, rounds=1, threads=1)


@needs_cpu_kernels
def test_a_tree_that_cannot_be_imported_is_refused(tree, monkeypatch):
    new = tree("new", "(")
    with pytest.raises(SystemExit, match=r"(?s)^new ended with exit code 1: .*SyntaxError"):
        compare.compare(new, new, CASES, rounds=1, threads=1)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # the installed library, if any, is found instead of the tree's
    with pytest.raises(SystemExit, match=r"^new(: softclip_kernels was imported from | ended with exit code 1: )"):
        compare.compare(new, new, CASES, rounds=1, threads=1)


@pytest.fixture
def repository(tmp_path):
    """Commits a setup.py and returns the repository."""
    path = tmp_path / "repository"
    path.mkdir()

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=path, check=True, capture_output=True)

    def commit(setup):
        git("init", "-q")
        (path / "setup.py").write_text(setup)
        git("add", "setup.py")
        git("commit", "-qm", "A commit")
        return path

    return commit


def _worktrees(repository):
    done = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    return len(done.stdout.splitlines())


@needs_git
def test_a_commit_is_built_in_a_worktree_that_goes_away(repository):
    path = repository(f"import pathlib\npathlib.Path('softclip_kernels').mkdir()\n"
                      f"pathlib.Path('softclip_kernels/_cpu{SUFFIX}').touch()")  # fmt: skip
    with compare.checked_out("HEAD", path) as tree:
        assert tree.name.startswith("HEAD (") and (tree.path / "setup.py").exists()
        assert _worktrees(path) == 2
    assert not tree.path.exists() and _worktrees(path) == 1


@needs_git
@pytest.mark.parametrize(
    ("setup", "revision", "refusal"),
    (
        ("", "no-such", "^'no-such' is not a commit of this repository"),
        ("raise SystemExit('no luck')", "HEAD", "(?s)^HEAD does not build: .*no luck"),
        ("print('there is no C++ compiler')", "HEAD", r"^HEAD \(.*\) has no CPU extension .*: there is no C\+\+"),
    ),
)
def test_a_commit_that_is_missing_or_does_not_build_is_refused(repository, setup, revision, refusal):
    path = repository(setup)
    with pytest.raises(SystemExit, match=refusal), compare.checked_out(revision, path):
        pass
    assert _worktrees(path) == 1
