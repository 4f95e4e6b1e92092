"""The layout shows the architecture: no module imports in a circle, no long signature is written twice, and a thing's
code, tests, benchmark and page share its name."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator

import pytest
from helpers import ROOT, interpreter
from helpers.backends import TRITON

from softclip_kernels.backends import cpu

PACKAGES = ("softclip_kernels", "train", "bench")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
LINES = 400  # a cap, not a goal
DESIGN = " ".join((ROOT / "docs" / "design.md").read_text().split())


# Circles.


def imported_by(name: str) -> set[str]:
    """The modules of ours that a module imports when it is imported, those of TYPE_CHECKING included. What a function
    imports when it is called is not among them."""
    path, found = FILES[name], set[str]()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in outside_functions(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in FILES)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base
                found.update({target} & set(FILES))
    return found - {name}


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from outside_functions(child)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every circle that a walk along the edges meets."""
    found, done = [], set[str]()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*trail, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return found


def test_no_module_imports_in_a_circle():
    assert circles({name: imported_by(name) for name in FILES}) == []


def test_a_circle_would_be_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert "softclip_kernels.stats" in imported_by("softclip_kernels.ops")
    assert "softclip_kernels.losses.softmax" in imported_by("softclip_kernels")


# Imports.

IMPORT_EACH = """
import importlib, os, sys, torch
for name in sys.argv[1:]:  # in a fork each, so that no module leans on what another has imported
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def installed(name: str) -> bool:
    """Whether a module's host is: an adapter bears its name, and its tests import it where it is."""
    package, _, last = name.rpartition(".")
    ours = package != "softclip_kernels.integrations" or last == "hooks"
    return ours or importlib.util.find_spec(last) is not None


def test_every_module_can_be_imported_first():
    names = [name for name in FILES if name.startswith("softclip_kernels") and not name.endswith("__main__")]
    if not TRITON:
        names = [name for name in names if not name.startswith("softclip_kernels.backends.triton.")]
    names = [name for name in names if installed(name)]
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, *names], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert len(names) > 30


def test_the_design_lists_every_module():
    """The tree in docs/design.md, by their last names."""
    for name in FILES:
        if name.startswith("softclip_kernels."):
            assert name.rpartition(".")[2] in DESIGN, name


# Depth.


@pytest.mark.parametrize(
    ("backend", "interpret", "most"), (("cpu", "0", 6), ("triton", "1", 12)), ids=("cpu", "triton")
)
def test_few_frames_lead_from_the_loss_to_a_kernel(backend, interpret, most):
    """As many as the design says."""
    if backend == "triton":
        pytest.importorskip("triton")
    elif not cpu.levels():
        pytest.skip(str(cpu.why_missing()))
    found = interpreter.result_of("bench.frames", "frames", backend, TRITON_INTERPRET=interpret)
    assert found[0].endswith(":softclip_loss") and len(found) <= most, found
    assert f"{len(found)} of ours to {'the C++ boundary' if backend == 'cpu' else 'a Triton kernel'}" in DESIGN


# Signatures.


def signatures(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every function of a module with the names of its parameters; of overloads, which are one function, the last."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.FunctionDef) and not any(
            isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in node.decorator_list
        ):
            arguments = node.args
            parameters = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            parameters += [argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
            yield f"{name}.{node.name}", tuple(each for each in parameters if each not in ("self", "cls", "ctx"))


def test_no_signature_of_more_than_four_parameters_stands_twice():
    written = defaultdict(list)
    for name in FILES:
        for function, parameters in signatures(name):
            if len(parameters) > 4:
                written[parameters].append(function)
    assert {parameters: where for parameters, where in written.items() if len(where) > 1} == {}
    assert len(written) > 20


# Names.


# A benchmark of one backend alone is called after its machine.
@pytest.mark.parametrize(
    ("name", "machine"), (("cpu", "cpu"), ("triton", "gpu"), ("distributed",) * 2, ("two_pass",) * 2)
)
def test_code_test_benchmark_and_page_share_a_name(name, machine):
    for folder, pattern in (
        (ROOT / "softclip_kernels", f"**/{name}*"),
        (ROOT / "tests", f"**/test_{name}*.py"),
        (ROOT / "bench", f"{machine}*"),
        (ROOT / "docs", f"{name}.md"),
    ):
        assert [path for path in folder.glob(pattern) if path.suffix != ".pyc"], f"{folder.name}/{pattern}"


def test_a_file_fits_in_a_head():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > LINES} == {}
