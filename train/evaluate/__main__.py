"""`python -m train.evaluate`: evaluate a finished or stopped run from its newest good checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import checkpoint
from ..config import ConfigError
from ..data import DataError, SetupError, data_folder, read_held_out
from ..files import explain
from ..fingerprint import SHORT, of_data
from . import evaluate_checkpoint, report


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description="Evaluate a finished or stopped run.")
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/emoji")
    options = parser.parse_args(arguments)
    try:
        folder = checkpoint.find(options.run, warn=lambda text: print(text, file=sys.stderr))
        config = checkpoint.read_config(folder)
        data = data_folder(config)
        _warn_of_other_data(folder, data)
        held_out = read_held_out(config, data)
        results = evaluate_checkpoint(folder, held_out)
        print(f"{folder}\n\n{report.text(results, held_out)}", flush=True)  # first, for the disk may be full
        report.write(options.run, folder, results, held_out)
    except (checkpoint.CheckpointError, ConfigError, DataError, SetupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def _warn_of_other_data(folder: Path, data: Path) -> None:
    """Held-out data are comparable only with the training data that they were held out from."""
    then = checkpoint.read_fingerprint(folder)
    if then is not None and then.data != (now := of_data(data)):
        words = f"{then.data[:SHORT]} then, {now[:SHORT]} in {data}"
        print(f"warning: {folder.name} was trained on other data (fingerprint {words})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
