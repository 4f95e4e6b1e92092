"""`python -m train export RUN --to FORM --out FOLDER`: a run's towers in a form that another library loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import PROGRAM, checkpoint
from ..files import words
from ..options import ConfigError
from . import FORMS, ExportError, export


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} export", description="Write a run's towers in a form that another library loads."
    )
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/emoji-1")
    parser.add_argument("--to", choices=tuple(FORMS), required=True, metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="the checkpoint of this step (default: the newest good one)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.checkpoint is None:
            folder = checkpoint.find(options.run, warn=lambda text: print(text, file=sys.stderr))
        else:
            folder = checkpoint.of_step(options.run, options.checkpoint)
        export(folder, options.to, options.out)
    except (checkpoint.CheckpointError, ConfigError, ExportError, OSError) as error:
        print(f"error: {words(error)}", file=sys.stderr)
        return 1
    print(f"{options.out}, from {folder}; load it by\n  {FORMS[options.to].loading.format(options.out)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
