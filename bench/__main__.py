"""python -m bench cpu|gpu|aot|distributed [options]; each prints its own with --help."""

from __future__ import annotations

import importlib
import sys

KINDS = ("cpu", "gpu", "aot", "distributed")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        given = repr(sys.argv[1]) if len(sys.argv) > 1 else "nothing"
        raise SystemExit(f"usage: python -m bench {{{','.join(KINDS)}}} [options]; got {given}")
    importlib.import_module(f".{sys.argv[1]}", __package__).main(sys.argv[2:])


if __name__ == "__main__":
    main()
