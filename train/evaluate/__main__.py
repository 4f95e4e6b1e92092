"""`python -m train evaluate RUN`: evaluate a finished or stopped run from its newest good checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .. import PROGRAM, checkpoint
from ..data import DataError, SetupError
from ..files import explain
from ..fingerprint import SHORT
from ..options import ConfigError
from . import evaluate_checkpoint, report
from .sets import Evaluation, read_evaluation


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} evaluate", description="Evaluate a finished or stopped run from its newest good checkpoint."
    )
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/emoji-1")
    parser.add_argument("--device", default="cpu", help="where the towers run (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        folder = checkpoint.find(options.run, warn=lambda text: print(text, file=sys.stderr))
        config = checkpoint.read_config(folder)
        if not config.data.evaluate:
            raise ConfigError(f"{options.run} has no data.evaluate; set it when you resume the run")
        evaluation = read_evaluation(config.data)
        _warn_of_other_data(folder, evaluation)
        results = evaluate_checkpoint(folder, evaluation, config.data, torch.device(options.device))
        print(f"{folder}\n\n{report.text(results, evaluation)}", flush=True)  # first, for the disk may be full
        report.write(options.run, folder, results, evaluation)
    except (checkpoint.CheckpointError, ConfigError, DataError, SetupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def _warn_of_other_data(folder: Path, evaluation: Evaluation) -> None:
    """Figures are comparable only where the data are the same."""
    then = checkpoint.read_fingerprint(folder)
    for name, pairs in evaluation.sets.items():
        before, now = ("" if then is None else then.evaluation.get(name, "")), pairs.source.fingerprint
        if before and before != now:
            words = f"{name} holds other data than when {folder.name} was written"
            print(f"warning: {words} (fingerprint {before[:SHORT]} then, {now[:SHORT]} now)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
