"""The README's examples run as printed, and the pages it links to exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from softclip_kernels.testing import matching_rows, unit_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_readme_example(index, one_rank):
    images = unit_rows(16, 8, dtype=torch.float32).requires_grad_()
    log_scale = torch.tensor(2.6, requires_grad=True)
    names = {
        "torch": torch,
        "image_features": images,
        "text_features": matching_rows(images.detach()).requires_grad_(),
        "logit_scale": log_scale.exp(),
        "teacher_images": unit_rows(16, 4, seed=2, dtype=torch.float32),
        "teacher_texts": unit_rows(16, 4, seed=3, dtype=torch.float32),
        "images": torch.randn(16, 5),
        "texts": torch.randn(16, 5),
        "model": Towers(),
        "step": 100,
    }
    exec(EXAMPLES[index], names)
    if "passes" not in names and images.grad is None:
        names["loss"].backward()
    assert names["loss"].isfinite()
    for gradient in (names["model"].project.weight.grad,) if "passes" in names else (images.grad, log_scale.grad):
        assert gradient.isfinite().all()


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_every_test_that_shows_a_promise_exists():
    files = {path.name: path for path in (ROOT / "tests").rglob("*.py")}
    file, named = "", 0
    for path, name in re.findall(r"(\w+\.py)?::(test_\w+)", (ROOT / "docs" / "promises.md").read_text()):
        file = path or file
        assert re.search(rf"^def {name}\(", files[file].read_text(), re.MULTILINE), f"{file}::{name}"
        named += 1
    assert named > 150
