"""docs/integrations.md as a reader follows it: every complete script runs, by every command that the page gives."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import PYTHONPATH, ROOT
from helpers.hosts import digits, pages

from bench.installed import missing

PAGE = (ROOT / "docs" / "integrations.md").read_text()
HOSTS = (
    "open_clip_train",
    "transformers",
    "accelerate",
    "lightning",
    "sentence_transformers",
    "pytorch_metric_learning",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's: the page's scripts, and pairs.csv, a table of pictures and captions."""
    folder = tmp_path_factory.mktemp("page")
    pages.write(PAGE, folder)
    digits.write_csv(folder, 128)
    return folder


def needs(command: str, folder: Path) -> list[str]:
    """The hosts that a command's script, or the module that it runs, imports."""
    named = re.findall(r"\w+\.py", command)
    text = "".join((folder / name).read_text() for name in named) + command.replace(
        "integrations.open_clip", "open_clip_train"
    )
    return [host for host in HOSTS if re.search(rf"\b{host}\b", text)]


@pytest.mark.parametrize("command", pages.commands(PAGE))
def test_a_command_of_the_page_runs(command, folder):
    for host in needs(command, folder):
        if why := missing(host):
            pytest.skip(f"not run: {why}")
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        pages.on_cpu(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_every_script_of_the_page_is_run_by_one_of_its_commands():
    run = {name for command in pages.commands(PAGE) for name in re.findall(r"\w+\.py", command)}
    assert run == set(pages.scripts(PAGE))


def test_scripts_and_commands_are_found():
    page = "```python\n# a.py\nx = 1\n```\n\n```sh\npython a.py\ntorchrun --nproc-per-node 2 \\\n    -m b -- --c\n```\n"
    assert pages.scripts(page) == {"a.py": "# a.py\nx = 1\n"}
    assert pages.commands(page) == ["python a.py", "torchrun --nproc-per-node 2 -m b -- --c"]
    assert pages.on_cpu(pages.commands(page)[1])[-6:] == ["-m", "helpers.hosts.on_cpu", "-m", "b", "--", "--c"]
