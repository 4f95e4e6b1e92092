"""The complete scripts of a page, and the commands with which it says to run them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

FENCED = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def scripts(page: str) -> dict[str, str]:
    """Python blocks whose first line is `# NAME.py`, by their names."""
    found: dict[str, str] = {}
    for kind, text in FENCED.findall(page):
        named = re.match(r"# (\w+\.py)\n", text)
        if kind == "python" and named:
            assert named[1] not in found, f"{named[1]} stands twice"
            found[named[1]] = text
    return found


def commands(page: str) -> list[str]:
    """Lines of shell blocks that run Python; one that goes on after a backslash is one line."""
    blocks = [text.replace("\\\n", " ") for kind, text in FENCED.findall(page) if kind == "sh"]
    lines = [" ".join(line.split()) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python ", "torchrun "))]


def on_cpu(command: str) -> list[str]:
    """The command in this interpreter, on a machine without a GPU."""
    program, *arguments = shlex.split(command)
    if program == "python":
        return [sys.executable, "-m", "helpers.hosts.on_cpu", *arguments]
    begin = next(k for k, one in enumerate(arguments) if one == "-m" or one.endswith(".py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", *arguments[:begin]]
    return [*launcher, "-m", "helpers.hosts.on_cpu", *arguments[begin:]]


def write(page: str, folder: Path) -> None:
    for name, text in scripts(page).items():
        (folder / name).write_text(text)
