"""The README's examples run as printed, links lead somewhere, and pages say what is so."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT

from softclip_kernels.testing import Result, Standard, unit_rows
from softclip_kernels.version import __version__

README = (ROOT / "README.md").read_text()
OPERANDS, DENSE, FUSED, *OTHERS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = sorted(page for folder in (".", "docs", "csrc") for page in (ROOT / folder).glob("*.md"))
WIDEST = 100  # columns of a line of prose


# The README's examples.


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(5, 8)
        self.log_scale = torch.nn.Parameter(torch.tensor([2.6]))

    def forward(self, images, texts):
        embeddings = (torch.nn.functional.normalize(self.project(inputs), dim=1) for inputs in (images, texts))
        return *embeddings, self.log_scale.exp()


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(example):
    """The names that an example leaves behind, after the operands that all begin with and what a reader brings."""
    torch.manual_seed(0)
    names = {}
    exec(OPERANDS, names)
    names |= {
        "teacher_images": unit_rows(len(names["image_features"]), 4, seed=2, dtype=torch.float32),
        "teacher_texts": unit_rows(len(names["image_features"]), 4, seed=3, dtype=torch.float32),
        "images": torch.randn(16, 5),
        "texts": torch.randn(16, 5),
        "model": Towers(),
        "step": 100,
    }
    exec(example, names)
    return names


@pytest.mark.parametrize("example", (DENSE, FUSED), ids=("dense", "fused"))
def test_the_dense_loss_and_the_librarys_are_the_same(example):
    """In the loss and in every gradient, by the library's own standard."""
    names = run(example)
    x, y, scale = (names[name] for name in ("image_features", "text_features", "logit_scale"))
    names["loss"].backward()
    Standard.of(x.detach(), y.detach(), scale.detach()).check(
        Result(names["loss"].detach(), x.grad, y.grad, scale.grad)
    )


def test_one_of_the_two_is_the_librarys():
    assert "cross_entropy" in DENSE and "softclip" not in DENSE
    assert "softclip_loss(" in FUSED and "cross_entropy" not in FUSED


@pytest.mark.parametrize("example", OTHERS, ids=lambda example: re.search("import (.+)", example)[1])
def test_an_example_runs_as_printed_and_its_loss_reaches_every_operand(example, one_rank):
    names = run(example)
    assert names["loss"].isfinite()
    if "passes" in names:  # which has gone backward already
        learning = names["model"].parameters()
    else:
        names["loss"].backward()
        learning = [names[name] for name in ("image_features", "text_features", "logit_scale")]
    for leaf in learning:
        assert leaf.grad.isfinite().all() and leaf.grad.any()


def test_there_are_examples():
    assert len(OTHERS) >= 4


# All pages.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def prose(text):
    """Line numbers and lines that are neither code nor rows of tables, links shortened to the words that are read."""
    fenced, indented, before = False, False, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            # Indented code begins after an empty line; within a paragraph or a list indentation is layout.
            indented = line.startswith("    ") and (indented or not before.strip())
            if not indented and not line.startswith("|"):
                yield number, re.sub(r"\]\([^)]*\)|https?://\S+", "]", line)
        before = line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_line_of_prose_is_wider_than_a_reader_wants(page):
    wide = [f"{page.name}:{number}: {len(line)}" for number, line in prose(page.read_text()) if len(line) > WIDEST]
    assert not wide, f"wider than {WIDEST} columns: {', '.join(wide)}"


def test_prose_is_told_from_tables_code_and_links():
    long = "word " * 30
    code = f"```python\n{long}\n```\n\n    {long}\n\n    {long}\n"
    assert not any(long in line for _, line in prose(f"text\n\n{code}\n| {long} |\n"))
    for text in (long, f"- an item\n    {long}", f"{code}\n{long}", f"text\n    {long}"):
        assert [line.strip() for _, line in prose(text) if len(line) > WIDEST] == [long.strip()]
    assert [line for _, line in prose(f"see [page](https://{'x' * 200})")] == ["see [page]"]


def test_every_test_that_shows_a_promise_exists():
    file, named = "", 0
    for path, name in re.findall(r"(\w+\.py)?::(test_\w+)", (ROOT / "docs" / "promises.md").read_text()):
        file = path or file
        found = [found.read_text() for found in (ROOT / "tests").rglob(file)]
        assert len(found) == 1 and re.search(rf"^def {name}\(", found[0], re.MULTILINE), f"{file}::{name}"
        named += 1
    assert named > 150


def test_the_citation_names_this_version():
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [__version__]
