"""Parts of a run's set-up: what is checked before anything is computed, and how the towers are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from . import checkpoint, deepspeed_options, towers
from .config import Config
from .data import TrainingData
from .data.training import Indexed
from .optimizers import make_optimizer
from .options import ConfigError
from .towers import Bundle
from .world import World, on_each, on_first


def check_options(config: Config, processes: int) -> None:
    """Raises ConfigError where they do not fit each other, or the number of processes."""
    deepspeed_options.check(config.deepspeed)
    options = config.optimizer
    if options.batch_size % processes:
        raise ConfigError(
            f"optimizer.batch_size={options.batch_size}; allowed: a multiple of the {processes} processes"
        )
    share = options.batch_size // processes
    if options.micro_batches > share:
        raise ConfigError(
            f"optimizer.micro_batches={options.micro_batches}; allowed: at most {share}, a process's share"
        )


def check_labels(config: Config, data: TrainingData) -> None:
    """Raises ConfigError where the hard target needs labels that the data do not have."""
    if config.loss.positives == "label" and not (isinstance(data, Indexed) and data.source.labels() is not None):
        raise ConfigError(
            f"loss.positives='label', but not every record of data.source={config.data.source!r} has a label that is "
            "known before it is read; allowed: shards, folders and tables with labels. Else use loss.positives=pair"
        )


def build_towers(config: Config, data: TrainingData, resumed: Path | None, world: World) -> Bundle:
    """The towers, alike on all ranks: those of a checkpoint, whose weights follow, or new ones. Each rank loads itself
    what these begin with; what `small` learns from the captions is rank 0's."""

    def files() -> Mapping[str, bytes] | None:
        if resumed is not None:
            return checkpoint.read_files(resumed)
        return towers.build(config.model, data.captions).files if config.model.towers == "small" else None

    shared = on_first(world, files)
    torch.manual_seed(config.job.seed)
    return on_each(world, lambda: towers.build(config.model, data.captions, files=shared))


def check_optimizer(bundle: Bundle, config: Config) -> None:
    """Raises ConfigError where the engine could not be made with it: there, ranks wait for one another."""
    options = config.optimizer
    groups = bundle.parameter_groups(options.weight_decay, options.layer_decay)
    make_optimizer(groups, options, config.job.zero_stage)
